"""Code that tests of every level share."""

import os

# Tests start child processes while gRPC's threads run in this one; its fork handlers then abort the child now and then.
# Read when grpc is first imported, so it must stand before any such import.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
