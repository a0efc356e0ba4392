from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.model = dict(
        vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, initializer_range=0.15,
    )
    c.compute = dict(dtype="float32", remat="none", logprob_chunk=4096)
    c.data = dict(source="procedural", num_train=16000, num_validation=300, num_test=300, vocab_size=512)
    c.sft = dict(
        epochs=4, batch_size=4, seq_len=128, mixce_eta=0.75, neftune_alpha=1.0, log_every=20,
        optimizer=dict(name="adalite", learning_rate=5e-4, warmup_ratio=0.1, freeze_embeddings=False),
    )
    c.rank = dict(
        epochs=1, batch_size=16, seq_len=128, rank_weight=5.0, neftune_alpha=1.0, keep_optimizer_state=True,
        optimizer=dict(name="adalite", learning_rate=3e-5, warmup_ratio=0.1, freeze_embeddings=False),
    )
    c.generate = dict(num_samples=8, temperature=1.0, top_p=1.0, max_new_tokens=48, batch_size=256, questions_per_round=500)
    c.rounds = dict(num_rounds=4, max_pairs_per_question=4)
    return c
