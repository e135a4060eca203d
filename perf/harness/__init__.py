"""The measurement that gates judge: servers, rounds, verdicts, the self-test, and the record."""
