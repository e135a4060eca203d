// Nothing is compiled here: the module carries the schemas of the Prometheus operator's kinds, as YAML files, and go.sum
// says which octets they must have. So `go mod tidy` would take it away.
module crd

go 1.26.0

require github.com/prometheus-operator/prometheus-operator v0.85.0
