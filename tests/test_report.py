"""report.html of made-up workdirs: numbers are there, hostile text stays text, gaps are named."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_workdir import (
    HOSTILE,
    make_workdir,
    record,
    write,
    write_lines,
)

from memphis_jax.report import (
    _shorten,
    choose_pairs,
    headline,
    main,
    standard_error,
    time_table,
    write_report,
)

pytestmark = pytest.mark.slow  # compiles much; `make check` leaves it out


class Page(HTMLParser):
    """Collects what matters of a page: its text outside scripts, its scripts, its addresses."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "data")]
        self.ids += [v or "" for k, v in attrs if k == "id"]

    def handle_data(self, data: str) -> None:
        inside = self.tags[-1] if self.tags else ""
        if inside == "script" and data.strip():
            self.scripts.append(data)
        elif inside not in ("script", "style"):
            self.words.append(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workdir(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return Page(write_report(finished))


def test_headline_and_facts(page: Page) -> None:
    said = "Test accuracy 53.0 % after SFT → 71.5 % after round 4 (+18.5 points, greedy decoding)."
    assert said in page.text
    for fact in ("configs/tiny.py", "c0ffee000000", "box7", "jax 0.10.2", "2024-02-03T10:00:00"):
        assert fact in page.text
    assert "3,000 parameters, 3 layers × 64 wide, 4 heads, vocabulary 512" in page.text  # noqa: RUF001
    assert "8 answers per question, temperature 1.0, top-p 1.0" in page.text
    assert "not finished" not in page.text
    assert "Not there yet" not in page.text


def test_numbers_of_each_section(page: Page) -> None:
    # sqrt(0.53 * 0.47 / 1000) = 0.01578 and sqrt(0.602 * 0.398 / 500) = 0.02189
    assert "53.0 ± 1.6 %" in page.text
    assert "60.2 ± 2.2 %" in page.text
    assert "round 3 500 187 240 63 10 700 1,234 2,300 1,400 260 40" in page.text
    assert "SFT 1,200" in page.text
    assert "in round 1 training" in page.text and "2.0 %" in page.text  # 16 of 800 cut off
    assert "sft.optimizer.learning_rate 0.0005" in page.text
    assert "python -m memphis_jax.train --config configs/tiny.py round2-rank" in page.text
    # data 3.25, sft 151, four more 3.25 s stages; per round 14.2 + 11 + 6 * 3.25
    total = 3.25 + 151 + 4 * 3.25 + 4 * (14.2 + 11 + 6 * 3.25)
    assert f"{int(total // 60)} min {round(total % 60):02d} s" in page.text
    assert page.text.count("2" * 64) == 38  # an output of each stage
    assert page.tags.count("svg") == 2 + 3 + 7 + 2 + 2


def test_the_grading_audit_of_each_round(page: Page) -> None:
    # source, answers, four verdicts, time-outs, truncated, repeats, malformed
    assert "sums 43 42 0 0 1 1 0 12 0" in page.text  # round 2
    assert "(none) 4 0 0 4 0 0 1 0 no answer header 3" in page.text
    assert "20 random answers graded correct in round 4" in page.text
    assert "1 random answer graded unknown in round 4" in page.text
    assert "answers graded incorrect" not in page.text
    assert "q1, sample 3, sums · time-out · answer 24 · ground truth 24" in page.text
    assert "q2, sample 3, · no answer header · ground truth <b>" in page.text
    assert "p […] p" in page.text and "(1,000 characters, 300 shown)" in page.text
    assert "xxthe end (1,002 characters, 600 shown)" in page.text


def test_shortened_texts_keep_both_ends() -> None:
    assert _shorten("x" * 9, 9) == "x" * 9
    assert _shorten("abcdefghij", 6) == "abcd […] ij\n(10 characters, 6 shown)"


def test_model_output_stays_text(page: Page, finished: Path) -> None:
    assert page.tags.count("script") == 2
    assert "img" not in page.tags
    assert HOSTILE not in (finished / "report.html").read_text(encoding="utf-8")
    browser = json.loads(page.scripts[0])
    assert browser[0]["pairs"][0][0] == "q1-0"
    shown = {text for part in browser for pair in part["pairs"] for text in pair}
    gold = "Mia has 7 shells. She finds 5 more. 7 + 5 = 12. Then the number doubles. 12 * 2 = 24"
    assert f"{gold}\n### Answer:\n24" in shown


def test_hostile_text_everywhere(tmp_path: Path) -> None:
    folder = make_workdir(tmp_path / HOSTILE.replace("/", "_"), rounds=1, pairs=2)
    record(folder, "round1-rank", 30, 1.0, note=HOSTILE)
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", config | {"data": {"source": HOSTILE}})
    page = Page(write_report(folder))
    assert page.tags.count("script") == 2
    assert "img" not in page.tags
    # data source, setting, the note in the ledger; the prompts of 21 audited samples
    assert page.words.count(HOSTILE) == 3 + 21
    assert f"round1-rank: {HOSTILE}" in page.text
    pair = json.loads(page.scripts[0])[0]["pairs"][1]
    assert pair[1:3] == ["Grün & “zwölf” \u2028 ?", HOSTILE]


def test_nothing_is_loaded_and_the_page_is_light(page: Page, finished: Path) -> None:
    assert all(address.startswith("#") for address in page.addresses)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert all(part.startswith("#") for part in text.replace("url('", "url(").split("url(")[1:])
    assert len(text.encode()) < 2_000_000


def test_ids_are_unique(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))


def test_same_files_same_page(finished: Path) -> None:
    first = write_report(finished).read_bytes()
    assert write_report(finished).read_bytes() == first


def test_empty_folder_names_the_gaps(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    assert "No test accuracy has been measured yet." in page.text
    assert "This run is not finished. No stage is done yet." in page.text
    assert page.text.count("Not there yet") == 10
    assert "svg" not in page.tags


def test_half_finished_run(tmp_path: Path) -> None:
    """SFT is evaluated; round 1 has metrics with a torn last line and a step logged twice."""
    folder = make_workdir(tmp_path, rounds=2)
    for gone in ("results.json", "eval/round1.json", "eval/round2.json", "round1/graded.jsonl"):
        (folder / gone).unlink()
    for stage in (folder / "ledger").glob("round2*"):
        stage.unlink()
    for path in sorted((folder / "round2").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with (folder / "round1" / "rank" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "loss": 9.8765, "rank_loss": NaN}\n{"step": 61, "lo')
    page = Page(write_report(folder))
    assert "Test accuracy 53.0 % after SFT; no round has been measured yet." in page.text
    assert (
        "This run is not finished. 14 stages are done, the last one is round1-accuracy."
        in page.text
    )
    assert "round 1 60 9.8765 – nan" in page.text  # noqa: RUF001
    assert "Not there yet" not in page.text
    assert [part["label"] for part in json.loads(page.scripts[0])] == ["round 1"]


def test_files_may_be_missing_in_any_mix(tmp_path: Path) -> None:
    folder = make_workdir(tmp_path, rounds=1, pairs=3)
    for gone in (
        ("config.json", "round1/graded.jsonl"),
        ("sft/metrics.jsonl", "round1/pairs.jsonl", "sft/hf/model.safetensors"),
        ("eval/sft.json", "round1/rank/metrics.jsonl"),
        ("round1/pairs.json", "results.json"),
    ):
        for name in gone:
            (folder / name).unlink()
        page = Page(write_report(folder))
        assert "round1-accuracy" in page.text
    assert "60.1 ± 1.5 %" in page.text  # what is left: the accuracy after round 1


def test_a_round_without_pairs(tmp_path: Path) -> None:
    folder = make_workdir(tmp_path, rounds=1, pairs=2)
    (folder / "round1" / "pairs.jsonl").write_text("")
    (folder / "round1" / "rank" / "metrics.jsonl").unlink()
    record(folder, "round1-rank", 20, 0.5, note="no pairs: the weights stay as they were")
    page = Page(write_report(folder))
    assert "round1-rank: no pairs: the weights stay as they were" in page.text
    assert "Not there yet: round*/pairs.jsonl with at least one pair." in page.text


def test_headline_can_fall() -> None:
    rows = [{"label": "SFT", "test_greedy": 0.6}, {"label": "round 1", "test_greedy": 0.385}]
    said = "Test accuracy 60.0 % after SFT → 38.5 % after round 1 (-21.5 points, greedy decoding)."
    assert headline(rows) == said


def test_standard_error_by_hand() -> None:
    assert standard_error(0.5, 100) == 0.05
    assert standard_error(1.0, 10) == 0.0


def test_time_table_by_hand() -> None:
    names = ("data", "sft", "sft-eval-greedy", "round12-eval-greedy", "report")
    table = time_table([{"stage": name, "seconds": float(i)} for i, name in enumerate(names)])
    assert table == {
        "data": {"set-up": 0.0},
        "sft": {"SFT": 1.0},
        "eval-greedy": {"SFT": 2.0, "round 12": 3.0},
        "report": {"set-up": 4.0},
    }


def test_chosen_pairs_are_spread_and_bounded() -> None:
    pairs = [{"id": f"{i:04d}", "chosen": "x" * 972} for i in range(1000)]  # 1,000 bytes as JSON
    assert len(json.dumps(pairs[0])) == 1000
    assert choose_pairs(pairs, 300, 10**9)[::100] == [pairs[0], pairs[333], pairs[666]]
    assert len(choose_pairs(pairs, 300, 50_000)) == 50
    assert choose_pairs(pairs[:7], 300, 50_000) == pairs[:7]
    assert choose_pairs([], 300, 50_000) == []


def test_long_completions_keep_the_page_under_two_megabytes(tmp_path: Path) -> None:
    folder = make_workdir(tmp_path, rounds=4, pairs=2)
    long = "<" * 200 + "word " * 700
    rows = [{"id": str(i), "prompt": "p", "chosen": long, "rejected": long} for i in range(400)]
    for r in range(1, 5):
        write_lines(folder / f"round{r}" / "pairs.jsonl", [row | {"gold": long} for row in rows])
    assert write_report(folder).stat().st_size < 2_000_000


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ledger").mkdir()
    main([str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").is_file()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nowhere")])
    assert "is not a folder" in capsys.readouterr().err
