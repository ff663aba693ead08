"""The command line: the whole story on tiny pictures, and a clear error for each way to get it wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from fastddpm import cli
from fastddpm.training import checkpoint
from tests.fake_hub import put_in_place

TINY = [
    "--base-channels", "8", "--channel-mult", "1,2", "--num-res-blocks", "1", "--attention-resolutions", "4",
    "--num-groups", "4", "--schedule", "log_snr", "--num-timesteps", "8", "--variance", "fixed_small",
    "--batch-size", "4", "--num-images", "16", "--warmup-images", "4", "--log-every-images", "8",
    "--checkpoint-every-images", "8", "--sample-every-images", "16", "--num-grid-samples", "4", "--grid-steps",
    "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of four pictures, 8 x 8, coloured."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for n in range(4):
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name / f"{n}.png")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional run that is done."""
    out = tmp_path_factory.mktemp("runs") / "run"
    cache = str(out.parent / "cache")
    assert cli.main(["train", str(photos), "--out", str(out), "--cache-dir", cache, "--class-conditional", *TINY]) == 0
    return out


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """The one line on stderr of a call that ends with this code."""
    try:
        ended = cli.main([str(a) for a in arguments])
    except SystemExit as stopped:  # argparse ends so
        ended = int(stopped.code or 0)
    message = capsys.readouterr().err
    assert ended == code, message
    assert "Traceback" not in message
    return message


def test_training_writes_what_it_says(run: Path) -> None:
    for name in ("metrics.jsonl", "loss.png", "samples/0000000016.png"):
        assert (run / name).exists(), name
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-0000000008", "checkpoint-0000000016"]


def test_sample_is_a_function_of_the_seed(run: Path, tmp_path: Path) -> None:
    def grid(name: str, *more: str) -> bytes:
        out = tmp_path / name
        call = [
            "sample",
            str(run),
            "--out",
            str(out),
            "--num-images",
            "3",
            "--batch-size",
            "4",
            "--labels",
            "all",
            *more,
        ]
        assert cli.main(call) == 0
        return out.read_bytes()

    assert grid("a.png") == grid("b.png") != grid("c.png", "--seed", "1")
    for n, more in enumerate((["--sampler", "ddim", "--num-steps", "4"], ["--sampler", "dpmpp_2m", "--num-steps", "4"],
                              ["--guidance-scale", "3", "--dynamic-threshold", "0.995"])):  # fmt: skip
        assert grid(f"{n}.png", *more) != grid("a.png")


def test_film_images_inpainting_and_interpolation(run: Path, photos: Path, tmp_path: Path) -> None:
    picture, other = str(photos / "cat" / "0.png"), str(photos / "dog" / "0.png")
    call = ["sample", str(run), "--out", str(tmp_path / "g.png"), "--num-images", "3", "--batch-size", "4"]
    film, folder = tmp_path / "film.gif", tmp_path / "images"
    assert cli.main([*call, "--film", str(film), "--save-images", str(folder)]) == 0
    with Image.open(film) as opened:  # one frame a step; the last ones may round to equal pixels, and then are one
        assert sum(frame.info["duration"] for frame in ImageSequence.Iterator(opened)) == 7 * 60 + 1500
    assert [p.name for p in sorted(folder.iterdir())] == ["000000.png", "000001.png", "000002.png"]

    mask = Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 0, 4, 8))
    mask.save(tmp_path / "mask.png")
    inpainted = tmp_path / "inpainted"
    assert (
        cli.main([*call, "--inpaint", picture, "--mask", str(tmp_path / "mask.png"), "--save-images", str(inpainted)])
        == 0
    )
    kept, made = np.asarray(Image.open(picture)), np.asarray(Image.open(inpainted / "000001.png"))
    assert (kept[:, :4] == made[:, :4]).all()
    assert (kept[:, 4:] != made[:, 4:]).any()
    assert cli.main([*call, "--interpolate", picture, other, "--interpolate-at", "4"]) == 0


@pytest.mark.parametrize("more", [[], ["--film", "film.gif"], ["--interpolate"]], ids=str)
def test_the_time_of_the_first_step_is_told_where_it_compiles(
    run: Path, photos: Path, tmp_path: Path, more: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    compiled: list[str] = []
    monkeypatch.setattr(cli, "compile_network", lambda network, mode: compiled.append(mode))
    monkeypatch.chdir(tmp_path)
    pictures = [str(photos / "cat" / "0.png"), str(photos / "dog" / "0.png")] if "--interpolate" in more else []
    call = ["sample", str(run), "--num-images", "4", "--batch-size", "2", *more, *pictures]
    assert cli.main(call) == 0
    assert "compiled" not in capsys.readouterr().out
    assert cli.main([*call, "--compile", "max-autotune"]) == 0
    printed = capsys.readouterr().out
    assert re.fullmatch(r"compiled the network in \d+\.\d s, in the first step", printed.splitlines()[0])
    assert printed.count("compiled") == 1 and compiled == ["max-autotune"]
    assert Path("film.gif").exists() == ("--film" in more)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_process_samples_with_what_the_first_compiled(run: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    call = [sys.executable, "-m", "fastddpm", "sample", str(run), "--num-images", "2", "--compile", "default"]
    call += ["--out", str(tmp_path / "grid.png")]
    seconds = []
    for _ in range(2):
        done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
        told = re.search(r"compiled the network in ([\d.]+) s", done.stdout)
        assert told is not None, done.stdout
        seconds.append(float(told[1]))
    assert seconds[1] < seconds[0] / 1.5, seconds


def test_evaluate_prints_and_writes_the_breakdown(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.main(["evaluate", str(run), str(photos), "--out", str(tmp_path), "--histogram-baseline", str(photos)]) == 0
    )
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "bits_per_dim.json").read_text(encoding="utf-8"))
    for term in ("prior", "decoder", "total", "histogram"):
        assert term in printed
    assert report["num_images"] == 8
    assert report["total"] == pytest.approx(report["prior"] + sum(report["per_timestep"]), rel=1e-9)
    assert (tmp_path / "bits_per_dim.png").exists()


def test_without_matplotlib_the_rest_works(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["evaluate", str(run), str(photos), "--out", str(tmp_path)]) == 0
    assert "pip install 'fastddpm[plot]'" in capsys.readouterr().out
    assert not (tmp_path / "bits_per_dim.png").exists()


def test_dry_run_leaves_no_file(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(photos), "--out", str(tmp_path / "run"), *TINY, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "parameters" in printed
    assert "16 images in 4 steps of 4" in printed
    assert not (tmp_path / "run").exists()


def test_info_says_how_it_was_built(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "native code" in printed
    assert "16 images seen" in printed


def test_info_tells_where_decoded_images_are(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache" / "fastddpm"
    assert cli.main(["info"]) == 0
    assert f"image cache  {cache}, empty" in capsys.readouterr().out
    assert cli.main(["train", str(photos), "--out", str(tmp_path / "run"), *TINY, "--dry-run"]) == 0
    assert f"kept in {cache}" in capsys.readouterr().out
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    assert cli.main(["info"]) == 0
    told = f"image cache  {cache}, {size / 1e6:,.1f} MB in 1 data set; may be deleted"
    assert told in capsys.readouterr().out


def test_as_a_process(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "fastddpm", "train", str(empty), "--out", str(tmp_path / "run")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("fastddpm: error: ")
    assert str(empty) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_corrupt_image_is_named_and_skipped_or_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(4):
        (folder / f"{n}.png").write_bytes((photos / "cat" / f"{n}.png").read_bytes())
    (folder / "bad.png").write_bytes((folder / "0.png").read_bytes()[:60])
    call = ["train", str(folder), "--out", str(tmp_path / "run"), *TINY, "--dry-run"]
    with pytest.warns(UserWarning, match=r"bad\.png"):
        assert cli.main(call) == 0
    capsys.readouterr()
    assert "bad.png" in error_of(capsys, *call, "--on-corrupt", "raise")


def test_a_wrong_image_size(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = tmp_path / "large"
    for name in ("cat", "dog"):
        (large / name).mkdir(parents=True)
        Image.new("RGB", (16, 12)).save(large / name / "0.png")
    assert "--resize resize" in error_of(capsys, "evaluate", run, large, "--out", tmp_path)
    assert cli.main(["evaluate", str(run), str(large), "--out", str(tmp_path), "--resize", "resize"]) == 0
    Image.new("RGB", (8, 8)).save(large / "cat" / "1.png")
    assert "--image-size" in error_of(capsys, "train", large, "--out", tmp_path / "run", *TINY)


def test_a_checkpoint_of_another_configuration(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "train", photos, "--out", run, "--class-conditional", *TINY, "--base-channels", "16")
    assert "base_channels" in message or "--base-channels" in message
    assert "16" in message


def test_a_half_written_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = tmp_path / "checkpoint-0000000016"
    half.mkdir()
    for path in (run / "checkpoint-0000000016").iterdir():
        content = path.read_bytes()
        (half / path.name).write_bytes(content[: len(content) // 2] if path.suffix == ".safetensors" else content)
    assert "safetensors" in error_of(capsys, "sample", half, "--out", tmp_path / "g.png")
    assert "nothing there" in error_of(capsys, "sample", tmp_path / "missing", "--out", tmp_path / "g.png")


def test_a_full_disk(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    message = error_of(capsys, "train", photos, "--out", tmp_path / "run", *TINY, code=1)
    assert "space" in message


def test_an_unknown_option_names_the_nearest(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean --learning-rate" in error_of(capsys, "train", photos, "--learning-rat", "1")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [("train photos --lr 1e-4", "--learning-rate"), ("train photos --ema=0.9", "--ema-decay"),
     ("train photos --batch 4", "--batch-size"), ("train photos --timesteps 8", "--num-timesteps"),
     ("train photos --epochs 3", "--num-images, which counts images, each pass over the data anew"),
     ("train photos --steps 3", "--num-images, which counts images, each pass over the data anew"),
     ("sample run --steps 3", "--num-steps"), ("sample run --timesteps 3", "--num-steps"),
     ("bench train --lr 1", "--learning-rate"), ("evaluate run photos --batch 3", "--batch-size"),
     ("evaluate run photos --output x", "--out")],
)  # fmt: skip
def test_an_option_of_other_programs_names_ours(capsys: pytest.CaptureFixture[str], arguments: str, meant: str) -> None:
    assert f"did you mean {meant}?" in error_of(capsys, *arguments.split())


def _numbers() -> list[tuple[str, str]]:
    """Every numeric option of a training, with a number that is out of its range."""
    found = [
        ("--" + cli.FLAG_OF.get(field.name, field.name).replace("_", "-"), "-3")
        for config, _ in cli.PARTS.values()
        for field in dataclasses.fields(config)
        if cli._inner(typing.get_type_hints(config)[field.name]) in (int, float)
        and not field.name.startswith("log_snr")
    ]
    return [*found, ("--log-snr-max", "-20"), ("--log-snr-min", "30")]


@pytest.mark.parametrize(("flag", "value"), _numbers())
def test_a_number_out_of_range_names_its_option(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    schedule = ["--schedule", "linear"] if flag.startswith("--beta") else ["--schedule", "log_snr"]
    message = error_of(capsys, "train", photos, "--out", tmp_path / "run", *TINY, *schedule, f"{flag}={value}")
    assert flag in message
    assert value in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--num-images", "0"), ("--num-steps", "9"), ("--eta", "-1"), ("--batch-size", "0"), ("--guidance-scale", "-1"),
     ("--labels", "7"), ("--labels", "cat"), ("--seed", "-1"), ("--columns", "0")],
)  # fmt: skip
def test_sample_refuses_numbers_out_of_range(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    error_of(capsys, "sample", run, "--out", tmp_path / "g.png", f"{flag}={value}")
    assert not (tmp_path / "g.png").exists()


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "info"])
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"example:\n  fastddpm {command}" in capsys.readouterr().out


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that draws an image, or evaluates, fails."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    for name in ("sample", "interpolate"):
        monkeypatch.setattr(f"fastddpm.diffusion.GaussianDiffusion.{name}", never)
    monkeypatch.setattr(cli, "bits_per_dim", never)


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    ("option", "name", "expected"),
    [("--out", "bad.xyz", "--out to end in .png, .jpg"), ("--out", "bad", "--out to end in .png, .jpg"),
     ("--out", "bad.xbm", "--out to end in .png, .jpg"), ("--film", "bad.mp4", "--film to end in .gif or .webp"),
     ("--out", "file/g.png", "--out in a folder, or a new one"), ("--film", "file/f.gif", "--film in a folder"),
     ("--save-images", "file", "--save-images in a folder"), ("--out", "x" * 300 + "/g.png", "--out in a folder")],
)  # fmt: skip
def test_names_that_cannot_be_written_are_refused_before_the_first_step(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str,
    name: str, expected: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    for more in ([], ["--dry-run"]):
        assert f"sample: expected {expected}" in error_of(capsys, "sample", run, option, name, *more)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize("command", ["train", "evaluate", "bench"])
def test_folders_that_cannot_be_written_are_refused_before_the_work(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    calls: dict[str, list[object]] = {
        "train": ["train", photos, *TINY, "--out"],
        "evaluate": ["evaluate", run, photos, "--out"],
        "bench": ["bench", "sample", run, "--json"],
    }
    (tmp_path / "file").write_text("mine")
    for place in [tmp_path / "file" / "x", *([Path("/proc/x/y")] if Path("/proc/self").exists() else [])]:
        flag = calls[command][-1]
        assert f"{command}: expected {flag} in a folder" in error_of(capsys, *calls[command], place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("no_drawing")
def test_a_baseline_that_cannot_be_read_is_refused_before_the_evaluation(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(capsys, "evaluate", run, photos, "--out", tmp_path, "--histogram-baseline", tmp_path / "none")
    assert str(tmp_path / "none") in message


def test_a_run_that_goes_on_already_is_told_without_a_traceback(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = error_of(capsys, "train", photos, "--out", tmp_path, *TINY)
    assert "expected no other training" in message
    assert "choose another --out" in message


def test_an_error_of_torch_keeps_its_traceback(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "Trainer", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["train", str(photos), "--out", str(tmp_path), *TINY])


@pytest.mark.parametrize(
    ("data", "out"),
    [("own", "own"), ("own", "own/run"), ("own", "link"), ("link", "own/a/b"), ("run/samples", "run"),
     ("run/checkpoint-0000000008/x.npz", "run"), ("run/tensorboard/x", "run")],
)  # fmt: skip
def test_a_run_in_its_own_data_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: str, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "load_images", lambda *_, **__: pytest.fail("the data were read"))
    Path("own").mkdir()
    Path("link").symlink_to("own")
    Path(data).parent.mkdir(parents=True, exist_ok=True)
    for more in ([], ["--dry-run"]):
        message = error_of(capsys, "train", data, "--out", out, *TINY, *more)
        assert out in message
        assert ("choose a folder beside it, such as runs/own" if out != "run" else "choose another --out") in message
    assert not any(Path("own").iterdir())


def test_data_may_lie_beside_what_a_run_writes(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "project" / "photos")
    call = ["train", str(tmp_path / "project" / "photos"), "--out", str(tmp_path / "project"), *TINY]
    for _ in range(2):  # the second goes on
        assert cli.main(call) == 0


def _users_picture(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("option", "value", "file"),
    [("--out", "own/0001.png", "own/0001.png"), ("--film", "own/film.gif", "own/film.gif"),
     ("--save-images", "own", "own/000001.png"), ("--num-images", "2", "samples.png")],
)  # fmt: skip
def test_sample_replaces_its_own_pictures_and_no_others(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str,
    value: str, file: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    call = ["sample", run, "--num-images", "2", "--num-steps", "2", option, value]
    mine = _users_picture(Path(file))
    message = error_of(capsys, *call)
    assert file in message
    assert "fastddpm did not write; choose another name, or pass --overwrite" in message
    assert Path(file).read_bytes() == mine
    assert [path for path in Path().rglob("*") if path.is_file()] == [Path(file)], "nothing was drawn"
    for more in (["--overwrite"], [], ["--seed", "1"]):
        assert cli.main([str(a) for a in [*call, *more]]) == 0
        assert Path(file).read_bytes() != mine


def test_sample_does_not_replace_what_it_reads_or_write_a_file_twice(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    call = ["sample", run, "--num-images", "2", "--num-steps", "2"]
    assert cli.main([str(a) for a in [*call, "--save-images", "made"]]) == 0
    between = ["--interpolate", "made/000000.png", "made/000001.png"]
    assert "made/000001.png, which is read" in error_of(capsys, *call, *between, "--out", "made/000001.png")
    twice = error_of(capsys, *call, "--save-images", "made", "--out", "made/000000.png")
    assert "expected --out and --save-images to name different files" in twice
    Path("d.png").mkdir()
    assert "got the folder d.png" in error_of(capsys, *call, "--out", "d.png", "--overwrite")


@pytest.mark.parametrize("file", ["bits_per_dim.json", "bits_per_dim.png"])
def test_evaluate_replaces_its_own_report_and_no_other(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    call = ["evaluate", str(run), str(photos), "--out", str(tmp_path), "--timesteps-per-image", "2"]
    (tmp_path / file).write_text('{"mine": 1}')
    assert file in error_of(capsys, *call)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(file, '{"mine": 1}')]
    for more in (["--overwrite"], []):
        assert cli.main([*call, *more]) == 0


@pytest.mark.parametrize("file", ["loss.png", "samples/0000000016.png"])
def test_a_new_run_replaces_no_picture_of_the_user(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    out = tmp_path / "run"
    call = ["train", str(photos), "--out", str(out), *TINY]
    mine = _users_picture(out / file)
    assert f"{out / file}, which fastddpm did not write; choose another folder" in error_of(capsys, *call)
    assert (out / file).read_bytes() == mine
    (out / file).unlink()
    for _ in range(2):
        assert cli.main(call) == 0


@pytest.mark.parametrize("text", ["()", "", "none", "None", "( )", "[]"])
def test_attention_in_the_middle_alone_can_be_asked_for(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    call = ["train", str(photos), "--out", str(tmp_path / "run"), *TINY, "--attention-resolutions", text, "--dry-run"]
    assert cli.main(call) == 0
    plan = json.loads("{" + capsys.readouterr().out.partition("\n{")[2])
    assert plan["unet"]["attention_resolutions"] == []


@pytest.mark.parametrize(
    ("text", "values"), [("(1, 2)", [1, 2]), ("1,2", [1, 2]), ("1x2", [1, 2]), ("[1,]", [1]), ("1 2", [1, 2])]
)
def test_a_list_may_stand_in_brackets(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, values: list[int]
) -> None:
    call = ["train", str(photos), "--out", str(tmp_path / "run"), *TINY, "--attention-resolutions", "8"]
    assert cli.main([*call, "--channel-mult", text, "--dry-run"]) == 0
    assert json.loads("{" + capsys.readouterr().out.partition("\n{")[2])["unet"]["channel_mult"] == values


@pytest.mark.parametrize(
    ("text", "count"), [("2e6", 2_000_000), ("2_000_000", 2_000_000), ("1.5e3", 1500), ("16", 16), ("16.0", 16)]
)
def test_a_whole_number_may_be_written_as_people_do(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, count: int
) -> None:
    call = ["train", str(photos), "--out", str(tmp_path / "run"), *TINY, "--num-images", text, "--dry-run"]
    assert cli.main(call) == 0
    assert json.loads("{" + capsys.readouterr().out.partition("\n{")[2])["train"]["num_images"] == count


@pytest.mark.parametrize("text", ["1.5", "2e-1", "many", "inf", "nan", "1e999999999", ""])
@pytest.mark.parametrize("command", ["train", "sample"])
def test_what_is_no_whole_number_is_refused(
    photos: Path, capsys: pytest.CaptureFixture[str], text: str, command: str
) -> None:
    message = error_of(capsys, command, photos, "--num-images", text)
    assert "--num-images" in message
    assert "whole number" in message


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_mistyped_run_is_not_looked_up_on_the_hub(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:  # fmt: skip
    remote = put_in_place(tmp_path, monkeypatch)
    call = [command, "runs/phtos", *([photos] if command == "evaluate" else [])]
    assert "the hub says" in error_of(capsys, *call)
    shutil.copytree(run, tmp_path / "runs" / "photos")
    message = error_of(capsys, *call)
    assert "got 'runs/phtos': no such folder in runs; did you mean runs/photos?" in message
    assert "runs holds photos" in error_of(capsys, command, "runs/other", *call[2:])
    assert not list(remote.iterdir())


@pytest.mark.parametrize(
    ("more", "told"),
    [(["--num-steps", "9"], "expected --num-steps in [1, 8], got 9"),
     (["--dynamic-threshold", "2"], "expected --dynamic-threshold in (0, 1], got 2.0"),
     (["--interpolate", "a.png", "b.png"], "expected a picture that can be read, got a.png (image file is truncated)"),
     (["--interpolate", "c.png", "b.png"], "got b.png (No such file or directory); check the path"),
     (["--interpolate", "c.png", "c.png", "--interpolate-at", "99"], "expected --interpolate-at in [0, 8), got 99"),
     (["--inpaint", "c.png", "--mask", "d.txt"], "expected a picture that can be read, got d.txt (cannot identify")],
)  # fmt: skip
def test_errors_of_sample_name_its_options_and_files(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    more: list[str], told: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    whole = (photos / "cat" / "0.png").read_bytes()
    Path("c.png").write_bytes(whole)
    Path("a.png").write_bytes(whole[: len(whole) // 2])
    Path("d.txt").write_text("no picture")
    assert told in error_of(capsys, "sample", run, "--num-images", "2", *more)


def test_errors_of_train_name_its_options(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["train", photos, "--out", run, "--class-conditional", *TINY]
    message = error_of(capsys, *again, "--no-resume")
    assert f"expected --out without a run for --no-resume, got {run}/" in message
    assert "choose another --out, or neither --resume nor --no-resume" in message
    message = error_of(capsys, *again, "--learning-rate", "1e-3")
    assert "got --learning-rate: saved 0.0002, wanted 0.001; take the saved values, pass --allow-changes to" in message
    message = error_of(capsys, "train", photos, "--out", tmp_path / "r", "--image-size", "28")
    assert message.endswith("or for this size give --channel-mult 1,2,2 and --attention-resolutions 14\n")
    Image.new("RGB", (9, 8)).save(tmp_path / "0.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "1.png")
    message = error_of(capsys, "train", tmp_path, "--out", tmp_path.parent / "r")
    assert message.endswith("; pass --image-size to crop and resize them\n")


def test_a_name_in_a_path_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "num_images" / "seed.batch_size"
    assert f"got {missing};" in error_of(capsys, "train", missing, "--out", tmp_path / "run")


def test_a_checkpoint_that_was_rotated_away_names_those_that_are_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    message = error_of(capsys, "sample", run / "checkpoint-0000000004")
    assert f"pass one of {run / 'checkpoint-0000000016'}; {run / 'checkpoint-0000000008'}" in message


def test_a_reader_that_has_enough_ends_the_command_in_silence() -> None:
    call = [sys.executable, "-m", "fastddpm", "info"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141
