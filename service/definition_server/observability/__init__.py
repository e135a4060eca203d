"""JSON logs, and the metrics by the names that dashboards in the field query."""
