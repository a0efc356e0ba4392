"""The embedded default of `make demo`: the whole recipe on word problems, on two CPU cores.

Every part is the real one, only small. The model starts from random weights, where Memphis started
from a trained 3B; that is why the embeddings train, the learning rates are high and the optimizer's
statistics are kept from phase to phase.
Numbers without a source were chosen on the held-out questions of seed 0, SFT's epochs and learning
rate on those of seeds 0 to 2 (README).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.model = {
        "vocab_size": 512,  # tokens
        "hidden_size": 64,
        "intermediate_size": 176,  # 3B's ratio to hidden_size
        "num_hidden_layers": 3,
        "num_attention_heads": 2,  # head_dim 32, the least that vLLM's attention on a CPU takes
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,  # tokens
        "initializer_range": 0.15,  # Adalite steps relative to the weights: 0.02 learns slowly
    }
    config.compute = {
        "dtype": "float32",
        "remat": "none",  # memory is no concern at this size
        "logprob_chunk": 4096,  # tokens
    }
    config.data = {
        "source": "procedural",
        "num_train": 16000,  # rows
        "num_validation": 300,
        "num_test": 300,
        "vocab_size": 512,  # tokens
    }
    config.sft = {
        "epochs": 5,
        "batch_size": 4,  # packed rows of seq_len tokens, about 12 examples
        "seq_len": 128,  # tokens
        "mixce_eta": 0.75,  # Memphis-CoT card
        "neftune_alpha": 1.0,  # card: 10, for a trained model of width 2560
        "optimizer": {
            "name": "adalite",  # card
            "learning_rate": 6.5e-4,  # peak
            "warmup_ratio": 0.1,  # share of the steps
            "freeze_embeddings": False,  # card: frozen; random ones must learn
        },
        "checkpoint_every": 500,  # steps
        "log_every": 200,  # steps
    }
    config.rank = {
        "epochs": 1,  # card
        "batch_size": 16,  # pairs
        "seq_len": 128,  # tokens
        "rank_weight": 5.0,  # card
        "neftune_alpha": 1.0,
        "keep_optimizer_state": True,  # a fresh state collapses at this size
        "optimizer": {
            "name": "adalite",  # card
            "learning_rate": 1.5e-5,  # peak; a few times more, and later rounds undo earlier ones
            "warmup_ratio": 0.1,  # card
            "freeze_embeddings": False,
        },
        "checkpoint_every": 20,  # steps
        "log_every": 5,  # steps
    }
    config.generate = {
        "engine": "jax",
        "num_samples": 8,  # card: answers per question
        "temperature": 1.0,  # card: 0.5, which gives half the pairs here
        "top_p": 1.0,  # card: 0.8
        "max_new_tokens": 48,
        "batch_size": 128,  # sequences decoded at once
        "questions_per_round": 500,  # another random share of the training questions each round
    }
    config.rounds = {
        "num_rounds": 4,  # card
        "max_pairs_per_question": 4,
        "eval_samples": 4,  # sampled answers per held-out question
    }
    return config
