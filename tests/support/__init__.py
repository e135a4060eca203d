"""Code that tests of every level share."""

import os

# Tests start child processes while gRPC's threads run in this one, and gRPC's fork handlers would sometimes abort the
# child. The variable is read when grpc is first imported, so it must be set before any such import.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
