"""The embedded default of the scribe recipe, on two CPU cores: sums first, then another skill.

A small CoT model is made by configs/tiny.py (SFT and two rounds), finetuned on questions of another
kind, and merged back with itself as it was. Every part is the real one, only small. Numbers without
a source were chosen on the held-out questions of seed 0.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.start = {
        "rounds_config": "tiny.py",  # beside this file
        "rounds_overrides": (
            "--config.sft.epochs=3",
            "--config.rounds.num_rounds=2",
            "--config.rounds.eval_samples=1",
            "--config.data.num_validation=200",
            "--config.data.num_test=200",
        ),
    }
    config.compute = {
        "dtype": "float32",
        "remat": "none",  # memory is no concern at this size
        "logprob_chunk": 4096,  # tokens
    }
    config.data = {
        "source": "procedural",
        "task": "more",  # who has more, and by how many; the start was made on sums
        "num_train": 3000,  # rows
        "num_validation": 200,
        "num_test": 200,
    }
    config.sft = {
        "epochs": 1,
        "batch_size": 4,  # packed rows of seq_len tokens
        "seq_len": 128,  # tokens
        "mixce_eta": 0.5,  # scribe card
        "neftune_alpha": 1.0,  # card: 10, for a trained model of width 2560
        "optimizer": {
            "name": "adalite",  # card
            "learning_rate": 2e-4,  # peak
            "warmup_ratio": 0.2,  # share of the steps
            "freeze_embeddings": False,  # the start's embeddings were trained too
        },
        "checkpoint_every": 200,  # steps
        "log_every": 50,  # steps
    }
    config.rank = config.sft  # not used: this recipe has no rounds
    config.generate = {
        "engine": "jax",
        "max_new_tokens": 48,
        "batch_size": 128,  # sequences decoded at once
        "batch_questions": 400,  # ours: questions in a published block
    }
    config.rounds = {"num_rounds": 0}
    config.merge = {
        "method": "slerp",  # scribe card
        "t": 0.4,  # its mergekit_config.yml
        "threshold": 0.9995,  # mergekit
        "sweep": (0.0, 0.25, 0.5, 0.75, 1.0),
    }
    return config
