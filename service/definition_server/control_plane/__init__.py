"""The master, the process that reads the table, builds and publishes snapshots, keeps workers running, and reports its
status.
"""
