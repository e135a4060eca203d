"""The master: reads the table, builds and publishes snapshots, keeps workers running, reports its status."""
