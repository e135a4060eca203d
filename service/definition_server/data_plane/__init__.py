"""The worker: answers calls from memory. It has no database connection and no credentials, and uses no disk."""
