import subprocess
import sys
from pathlib import Path

import pytest
from reference_models import make_hf, rewrite

from convert.__main__ import main, size
from memphis_jax.checkpoint import read_meta

REPO = Path(__file__).resolve().parents[1]


def cli(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "convert", *map(str, args)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)


def test_commands(tmp_path, capsys):
    hf, ckpt, back = (str(tmp_path / name) for name in ("hf", "ckpt", "back"))
    make_hf(tmp_path / "hf")
    assert main(["from-hf", hf, ckpt]) == 0
    assert "no tokenizer.json" in capsys.readouterr().out
    assert main(["to-hf", ckpt, back, "--dtype", "bfloat16", "--max-shard-size", "30KB"]) == 0
    assert main(["verify", back, ckpt]) == 0
    out = capsys.readouterr().out
    assert "compared as bfloat16" in out and "equal: 26 tensors" in out
    assert read_meta(ckpt)["converted_from"]["dtypes"] == ["float32"]
    rewrite(tmp_path / "hf", lambda tensors: tensors["lm_head.weight"].fill(0))
    assert main(["verify", hf, ckpt]) == 1
    assert "differs: lm_head.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["from-hf", "absent", "ckpt"], "absent/config.json does not exist"),
        (["to-hf", "absent", "hf"], "absent holds no complete checkpoint"),
        (["verify", "absent", "ckpt"], "absent is not a folder"),
        (["from-hf", "llama", "ckpt"], "model_type = 'llama'"),
        (["from-hf", "broken", "ckpt"], "config.json is not JSON"),
    ],
)
def test_refusal_is_one_line_and_code_2(args, message, tmp_path):
    for name, text in (("llama", '{"model_type": "llama"}'), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    done = cli(args[0], tmp_path / args[1], tmp_path / args[2])
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr


def test_help_does_not_wait_for_jax():
    code = "import sys; from convert.__main__ import main\ntry: main(['--help'])\n"
    code += "except SystemExit: sys.exit(len({'jax', 'numpy', 'orbax'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and "from-hf" in done.stdout


def test_size():
    assert (size("5GB"), size("1.5 MB"), size("2GiB"), size("10b")) == (5e9, 1.5e6, 2**31, 10)
    for text in ("5", "GB", "-1GB", "0GB", "5 parsecs"):
        with pytest.raises(ValueError, match="is not a size"):
            size(text)
