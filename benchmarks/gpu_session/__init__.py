"""Run everything that needs a GPU, in one command that needs only this checkout.

    python benchmarks/gpu_session --minutes 9 --out DIR

runs the parts below, each in a separate process with its share of the time. DIR/<part>.json is rewritten with
every new result, DIR/summary.json after every part. A part that crashes or overruns is recorded, and the next
one runs; the exit status is then 1.

    correct  every op against float64: float32, bfloat16, offsets beyond 2^31; the GPU side of tests/ops
    ops      every op against its peers (as `pgolf bench`), also as ops.jsonl
    step     the whole training step against the same model in plain PyTorch; losses; time by kernel
    eval     a chunk of scoring and test-time training against the same model in plain PyTorch
    tune     tiles (as `pgolf tune`), as tiles.json

`--dry-run` rehearses all of it on a CPU at toy sizes.
"""
