"""The image, as an operator builds, runs and replaces it. Needs a Docker engine; see docs/containers.md."""
