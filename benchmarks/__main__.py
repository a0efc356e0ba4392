"""`python -m benchmarks NAME`: measures, prints a table, and writes JSON."""

import importlib
import sys

BENCHMARKS = {
    "data": "building and loading tokens, packing, the contamination guard",
    "eval": "engines of `memphis eval` side by side: agreement and wall time",
    "train": "an SFT and a rank step beside transformers + torch and a naive JAX step",
    "rank": "the ranking step with packed answers and with padded ones",
    "sampler": "tokens/s of the JAX sampler, vLLM and transformers, side by side",
    "startup": "seconds to help, imports, and to the first training step",
    "demo": "seconds of each kind of stage of the demo, or of finished recipes side by side",
    "scaling": "step time and memory against length, batch, layers and devices",
    "convert": "conversion both ways, beside a plain copy; orbax save and restore",
    "merge": "merging two models, beside mergekit on the same files",
    "gpu": "the 3B on one GPU: steps, MFU, memory, sampling, beside torch + flash attention",
    "memory": "chunked logprobs against full logits, optimizer state, what fits",
    "page": "docs/performance.md, from the results in docs/performance/",
    "grading": "gold answers against themselves and each other; time per 100,000 gradings",
}


def main(argv: list[str]) -> None:
    if not argv or argv[0] not in BENCHMARKS:
        print("usage: python -m benchmarks NAME [options]     (NAME --help tells more)\n")
        for name, about in BENCHMARKS.items():
            print(f"  {name:10} {about}")
        sys.exit(0 if not argv or argv[0] in ("-h", "--help") else 2)
    importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
