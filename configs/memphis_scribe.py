"""Memphis-scribe-3B-alpha: what its model card says (euclaise/Memphis-scribe-3B-alpha, 2024).

"card" is that page; "mergekit_config.yml" is the file of that name in the same repository. The card
names data, loss and merge and no other hyperparameter: for these, "CoT card" is the SFT of
euclaise/Memphis-CoT-3B, and "supertrainer" as in configs/memphis_cot.py. "ours" is a choice of this
project. (The later Memphis-scribe-3B is another recipe: other data, a ranking loss of weight 0.2,
SLERP with a weight of 0.8.) Before it runs, set

  --config.start.hf_folder     the last export of a run of configs/memphis_cot.py, or
                               euclaise/Memphis-CoT-3B, downloaded (safetensors)
  --config.data.root           a folder of local copies; leave it out to read from the hub
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # ours: that of memphis_cot.py, so that the same questions are held out
    config.start = {"hf_folder": "memphis-cot-3b"}  # card: Memphis-CoT 3B
    config.compute = {
        "dtype": "bfloat16",  # mergekit_config.yml: of the merge; ours: of activations, matmuls
        "remat": "full",  # ours: every layer is recomputed in the backward pass
        "logprob_chunk": 512,  # ours: tokens
    }
    config.data = {
        "source": "mixture",  # docs/data.md: filters, revisions
        "mixture": {
            "tinycot": {},  # card: "trained further on TinyCoT"
            "reddit_instruct": {"rows": 10000},  # card
            "writingprompts_curated": {"rows": 15000},  # card
            "mathqa_programs": {"rows": 4000},  # card
            "booksum_short": {"rows": 3000},  # card: both directions, so 6000 examples
            "mathoverflow_accepted": {"rows": 10000},  # card
            "coedit": {"rows": 1000},  # card
            "oasst2_curated": {},  # card: among its data sets; no number is named
        },
        "num_validation": 300,  # ours: questions of TinyCoT that are not trained on
        "num_test": 300,  # ours
    }
    config.sft = {
        "epochs": 2,  # CoT card
        "batch_size": 128,  # CoT card: here packed rows of seq_len tokens
        "accumulation": 8,  # ours: 16 rows of 4096 tokens at once; fit it to the memory
        "seq_len": 4096,  # CoT card: tokens
        "mixce_eta": 0.5,  # card: MixCE ratio
        "neftune_alpha": 10.0,  # CoT card
        "optimizer": {
            "name": "adalite",  # CoT card
            "learning_rate": 1e-5,  # CoT card: peak
            "warmup_ratio": 0.2,  # CoT card: share of the steps, then cosine
            "freeze_embeddings": True,  # CoT card: input embedding and lm_head
            "lambda_": 0.01,  # CoT card
            "eps": 1e-5,  # supertrainer
            "beta_decay": 0.8,  # supertrainer
            "centralize": True,  # supertrainer
            "momentum": 0.0,  # supertrainer
        },
        "checkpoint_every": 50,  # ours: steps
        "log_every": 1,  # ours: steps
    }
    config.rank = config.sft  # not used: this recipe has no rounds
    config.generate = {
        "engine": "vllm",  # as in memphis_cot.py; here it only answers held-out questions
        "max_new_tokens": 512,  # CoT card
        "batch_questions": 256,  # ours: questions in a published block
    }
    config.rounds = {"num_rounds": 0}
    config.merge = {
        "method": "slerp",  # card
        "t": 0.4,  # mergekit_config.yml
        "threshold": 0.9995,  # mergekit's own, which has no setting for it
        "sweep": (0.0, 0.25, 0.5, 0.75, 1.0),  # ours
    }
    return config
