"""The image, as an operator builds, runs and replaces it. Wants a Docker engine; docs/containers.md."""
