"""Logs in JSON, and metrics under the names that existing dashboards query."""
