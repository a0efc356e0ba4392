"""On every worker of a pod at once: are all devices there? The last word says how many."""

import os
import sys

import jax

if "JAX_PROCESS_ID" in os.environ:
    jax.distributed.initialize(
        os.environ["JAX_COORDINATOR_ADDRESS"],
        int(os.environ["JAX_NUM_PROCESSES"]),
        int(os.environ["JAX_PROCESS_ID"]),
    )
found, wanted = jax.device_count(), int(sys.argv[1])
kind = jax.devices()[0].device_kind
print(f"{found} devices ({kind}), {jax.local_device_count()} on this worker", flush=True)
if found != wanted:
    sys.exit(f"{wanted} devices were expected: is JAX of this version made for this TPU?")
