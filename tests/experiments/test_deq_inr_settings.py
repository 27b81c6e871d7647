"""Settings, files and pictures that implicit representations are given: right ones, wrong ones, absent ones."""

import numpy as np
import pytest

from deqjax.cli import load_config
from deqjax.data.images import pillow
from experiments import deq_inr
from experiments.inr_signals import SignalTask
from tests.experiments.inr import ROOT, configured

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("inr_*.py"))
PRESETS = {
    "inr_camera.py": ["", "clipped", "DEQ-siren_like-1L512D", "gabor-4L256D", "original/DEQ-fourier-1L256D"],
    "inr_astronaut.py": ["", "generalize"],
    "inr_celeba.py": ["DEQ-siren_like-1L256D"],
    "inr_nature.py": ["DEQ-siren_like-1L512D", "original/gabor-4L256D"],
    "inr_audio.py": ["", "DEQ-siren_like-1L512D", "original/DEQ-gabor-4L256D"],
    "inr_video.py": ["", "DEQ-siren_like-1L2048D", "original/DEQ-fourier-1L2048D"],
    "inr_occupancy.py": ["", "DEQ-fourier-1L256D", "gabor-4L256D"],
    "inr_sdf.py": ["", "thai_statue"],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_one_of_a_task(name):
    for variant in PRESETS.get(name, [""]):
        config = load_config(str(ROOT / "configs" / f"{name}:{variant}"))
        task = deq_inr.make_task(config)
        assert task.config.model.network in ("deq", "one_pass")
        assert config.warm_start <= (config.model.network == "deq")
    with pytest.raises(Exception, match="variant"):
        load_config(str(ROOT / "configs" / f"{name}:no-such"))


def test_published_videos_have_the_published_scales():
    scale = lambda name: load_config(str(ROOT / "configs" / f"inr_video.py:original/DEQ-{name}D")).model.input_scale
    low, high = ("siren_like-1L1024", "siren_like-1L2048", "gabor-1L1024"), ("siren_like-4L1024", "fourier-1L2048")
    assert {scale(name) for name in low} == {128.0} and {scale(name) for name in high} == {256.0}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("inr_celeba.py", "celeba_128_tiny.npy is missing"),
        ("inr_nature.py", "data_div2k.npz is missing"),
        ("inr_text.py", "data_2d_text.npz is missing"),
        ("inr_audio.py:DEQ-siren_like-1L512D", "gt_bach.wav is missing"),
        ("inr_video.py:DEQ-siren_like-1L2048D", "cat_video.mp4 is missing"),
        ("inr_occupancy.py:DEQ-fourier-1L256D", "dragon.ply"),
        ("inr_sdf.py:thai_statue", "thai_statue.xyz"),
    ],
)
def test_absent_data_say_where_they_belong_and_what_to_do_instead(config, words, capsys, tmp_path):
    command = ["deq_inr", f"--config={ROOT}/configs/{config}", f"--workdir={tmp_path}", f"--config.data.dir={tmp_path}"]
    assert deq_inr.main(command) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert words in error and "configs/inr_" in error and "Traceback" not in error


SDF = ["--config.data.kind=sdf", "--config.data.name=torus"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--config.data.kind=smell"], "data.kind"),
        (["--config.data.name=dog"], "data.name='dog'"),
        (["--config.data.step=0"], "data.step=0"),
        (["--config.data.batch_size=-1"], "data.batch_size"),
        (["--config.data.channels=4"], "data.channels=4"),
        (["--config.warm_start_dtype=int8"], "warm_start_dtype='int8'"),
        (["--config.data.memory_gib=inf"], "data.memory_gib=inf"),
        (["--config.render.scale=inf"], "render.scale=inf"),
        (["--config.render.shape=(5.5, 7)"], "render.shape"),
        (["--config.data.kind=audio", "--config.data.name=melody", "--config.data.seconds=1e-5"], "no samples"),
        (["--config.model.filter=relu"], "filter='relu'"),
        (["--config.data.path=absent.png"], "no such file"),
        (["--config.deq.f_max_iter=-1"], "f_max_iter"),
        (["--config.deq.core=indexing"], "warm_start=False"),
        (["--config.deq.f_max_iter=0", "--config.deq.eval_f_max_iter=9"], "first visit"),
        (["--config.data.memory_gib=0.001", "--config.data.step=1"], "warm_start=False"),
        (SDF, "warm_start"),
        ([*SDF, "--config.warm_start=false", "--config.data.batch_size=8"], "hook_ift"),
        (
            [
                *SDF,
                "--config.warm_start=false",
                "--config.data.batch_size=8",
                "--config.deq.n_states=2",
                "--config.deq.hook_ift=1",
            ],
            "n_states",
        ),
    ],
)
def test_a_wrong_setting_is_one_paragraph(settings, words, capsys, tmp_path):
    command = ["deq_inr", f"--config={ROOT}/configs/inr_camera.py", f"--workdir={tmp_path}", *settings]
    assert deq_inr.main(command) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert words in error and "Traceback" not in error


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "I;16", "1"])
def test_pictures_of_every_mode_are_signals(tmp_path, mode):
    values = np.random.default_rng(0).integers(0, 256, (6, 5)).astype(np.uint8)
    image = pillow().fromarray(values.astype(np.uint16) * 257 if mode == "I;16" else values)
    (image if mode == "I;16" else image.convert(mode)).save(tmp_path / "p.png")
    task = SignalTask(configured(data__path=str(tmp_path / "p.png"), data__step=1))
    batch = task.batch(0)
    # Grey stays grey; 30 pixels are filled up to a multiple of 8.
    assert batch["target"].shape == (32, 1, 3 if mode in ("RGBA", "P") else 1) and batch["weight"].sum() == 30
    assert np.all(np.abs(batch["target"]) <= 1)


@pytest.mark.parametrize(
    ("name", "signal"), [("inr_camera.py", "camera"), ("inr_camera.py", "astronaut"), ("inr_video.py", "waves")]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_and_videos_have_the_channels_asked_for(name, signal, channels):
    task = SignalTask(configured(name, data__name=signal, data__channels=channels, data__frames=2))
    assert task.signal.raw.shape[-1] == channels and task.signal.raw.dtype == np.uint8
