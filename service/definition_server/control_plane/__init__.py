"""The master: reads the table, builds and publishes snapshots, keeps workers alive, tells how it is."""
