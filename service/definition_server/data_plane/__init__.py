"""The worker: answers from RAM. It holds no database connection and no credential, and touches no disk."""
