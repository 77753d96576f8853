"""One of two processes that read and write a checkpoint together. Run by test_streaming.py:

python -m tests.models.run_as_process PORT PROCESS_ID CHECKPOINT OUTPUT
"""

import sys

import jax


def main():
    port, process_id, checkpoint, output = sys.argv[1:]
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process_id))
    from r2vpo_jax import models, sharding

    assert (jax.device_count(), jax.local_device_count()) == (4, 2)
    mesh = sharding.make_mesh((1, 4, 1))
    model, params = models.from_pretrained(checkpoint, mesh=mesh)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert not kernel.is_fully_addressable
    assert {shard.data.shape[1] for shard in kernel.addressable_shards} == {kernel.shape[1] // 4}
    write = process_id == "0"
    models.save_pretrained(f"{output}/{process_id}", model, params, max_shard_bytes=20_000, write=write)
    spoiled = params | {"embed": params["embed"] * float("nan")}
    try:
        models.save_pretrained(f"{output}/spoiled", model, spoiled, write=write)
    except ValueError as error:
        print(error)


if __name__ == "__main__":
    main()
