# Runs a case of the interoperability client of gRPC's Ruby library: interop.rb CLIENT --server_host ... --test_case ...
#
# Of the cases with compressed requests the probe is left out. It asks whether the server sees that a request was *not*
# compressed. Servicers of grpc.aio see only messages, so no Python server can know that. The rest of these cases is
# judged: compressed and plain requests must both be understood.
load ARGV.shift

class NamedTests
  def send_probe_for_compressed_request_support
  end
end

main
