"""Memphis-CoT-3B: every hyperparameter of the model card (euclaise/Memphis-CoT-3B, 2024).

"card" is that page; "supertrainer" is euclaise/supertrainer2000 of 31 January 2024, whose defaults
the card refers to; "ours" is a choice of this project. Before it runs, set

  --config.start.hf_folder     stabilityai/stablelm-3b-4e1t, downloaded (safetensors)
  --config.data.root           a folder of local copies; leave it out to read from the hub
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # ours
    config.start = {"hf_folder": "stablelm-3b-4e1t"}  # card: the base model
    config.compute = {
        "dtype": "bfloat16",  # ours: activations and matmuls; parameters and losses are float32
        "remat": "full",  # ours: every layer is recomputed in the backward pass
        "logprob_chunk": 512,  # ours: tokens; 512 x 50304 logits take 0.1 GB
    }
    config.data = {
        "source": "mixture",  # docs/data.md: filters, revisions, how to add a data set
        "mixture": {
            "tinycot": {},  # card: all rows; the rounds ask its questions
            "reddit_instruct": {"rows": 5000},  # card
            "oasst2_curated": {},  # card: all rows
        },
        "num_validation": 300,  # ours: questions of TinyCoT that are not trained on
        "num_test": 300,  # ours
        # Training rows are compared with evaluation sets only where these are named (docs/data.md):
        # "evaluation": ("eval/gsm8k/test.jsonl", "eval/bbh"),  # ours: off without it
    }
    config.sft = {
        "epochs": 2,  # card
        "batch_size": 128,  # card: accumulated batch; here packed rows of seq_len tokens
        "accumulation": 8,  # ours: 16 rows of 4096 tokens at once; fit it to the memory
        "seq_len": 4096,  # card: tokens
        "mixce_eta": 0.75,  # card: MixCE ratio; 1 is cross entropy
        "neftune_alpha": 10.0,  # card
        "optimizer": {
            "name": "adalite",  # card
            "learning_rate": 1e-5,  # card: peak
            "warmup_ratio": 0.2,  # card: share of the steps, then cosine
            "freeze_embeddings": True,  # card: input embedding and lm_head
            "lambda_": 0.01,  # card
            "eps": 1e-5,  # supertrainer
            "beta_decay": 0.8,  # supertrainer
            "centralize": True,  # supertrainer
            "momentum": 0.0,  # supertrainer
        },
        "checkpoint_every": 50,  # ours: steps
        "log_every": 1,  # ours: steps
    }
    config.rank = {
        "epochs": 1,  # card: per round
        "batch_size": 128,  # card: here pairs
        "accumulation": 8,  # ours
        "seq_len": 1024,  # card: tokens
        "rank_weight": 5.0,  # card: weight of the ranking loss beside CE on the ground truth
        "mixce_eta": 1.0,  # card: plain CE in this phase
        "neftune_alpha": 10.0,  # card
        "keep_optimizer_state": False,  # supertrainer: a new optimizer in every round
        "optimizer": {
            "name": "adalite",  # card
            "learning_rate": 5e-7,  # card: peak
            "warmup_ratio": 0.1,  # card
            "freeze_embeddings": True,  # card
            "lambda_": 0.01,  # card
            "eps": 1e-5,  # supertrainer
            "beta_decay": 0.8,  # supertrainer
            "centralize": True,  # supertrainer
            "momentum": 0.0,  # supertrainer
        },
        "checkpoint_every": 50,  # ours
        "log_every": 1,  # ours
    }
    config.generate = {
        "engine": "vllm",  # card; on a GPU host: executor.generate, docs/gpu.md
        "num_samples": 8,  # card: answers per question
        "temperature": 0.5,  # card
        "top_p": 0.8,  # card
        "max_new_tokens": 512,  # card
        "batch_questions": 256,  # ours: questions in a published block
    }
    config.rounds = {
        "num_rounds": 4,  # card
        "max_pairs_per_question": 0,  # card: no limit named
        "eval_samples": 1,  # ours: sampled answers per held-out question
    }
    return config
