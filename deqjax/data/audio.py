"""Sound: WAV files in and out, and a melody that needs none."""

import pathlib
import struct
import warnings

import numpy as np

from deqjax.data.errors import DataError


def read_audio(path) -> tuple[np.ndarray, int]:
    """The sound in a WAV file: one channel (the mean of several), its largest amplitude 1, and samples per second.

    Silence stays silent.

    Raises:
      DataError: there is no such file, it is no WAV file, it is cut off, it has no samples, or some that are not numbers.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            rate, samples = _wavfile().read(path)
    except (ValueError, EOFError, struct.error, OSError, TypeError, UnboundLocalError, ZeroDivisionError) as error:
        raise DataError(f"{path} is no WAV file that can be read ({error}).") from error
    if any("EOF prematurely" in str(warning.message) for warning in said) and not _streamed(path):
        raise DataError(f"{path} is cut off: it promises more samples than it has. Save or copy it again.")
    if not samples.size:
        raise DataError(f"{path} has no samples.")
    if samples.dtype == np.uint8:
        samples = samples.astype(np.float64) - 128  # the one format that is not centred
    samples = samples.astype(np.float64)
    if not np.all(np.isfinite(samples)):
        raise DataError(f"{path} has {np.sum(~np.isfinite(samples))} samples that are not finite numbers.")
    samples = samples.mean(axis=1) if samples.ndim == 2 else samples
    return (samples / (np.max(np.abs(samples)) or 1.0)).astype(np.float32), int(rate)


def _streamed(path) -> bool:
    """Whether whoever wrote the file could not know its length, and said so."""
    with open(path, "rb") as file:
        return file.read(8)[4:] == b"\xff\xff\xff\xff"


def write_audio(path, samples: np.ndarray, rate: int) -> None:
    """Writes one channel as a WAV file of 32-bit floats; beyond the amplitude 1 it is clipped."""
    _wavfile().write(path, rate, np.clip(np.nan_to_num(samples), -1, 1).astype(np.float32))


def melody(seconds: float = 2.0, rate: int = 8000, seed: int = 0) -> np.ndarray:
    """Plucked strings (Karplus and Strong 1983) on a pentatonic scale, four notes a second; largest amplitude 1.

    Raises:
      DataError: it would have no samples.
    """
    n = round(seconds * rate)
    if n < 1:
        raise DataError(f"a melody of {seconds} seconds at {rate} samples per second has no samples.")
    random, sound, step = np.random.default_rng(seed), np.zeros(n), max(rate // 4, 1)
    for start in range(0, n, step):
        semitones = random.choice([0, 2, 4, 7, 9, 12])
        sound[start:] += _string(220 * 2 ** (semitones / 12), n - start, rate, random)
    return (sound / np.max(np.abs(sound))).astype(np.float32)


def _string(frequency, n, rate, random):
    """A delay line full of noise whose neighbours are averaged on every round: period by period."""
    period = max(round(rate / frequency), 2)
    line, rounds = random.uniform(-1, 1, period), []
    for _ in range(-(-n // period)):
        rounds.append(line)
        line = 0.996 * 0.5 * (line + np.roll(line, 1))
    return np.concatenate(rounds)[:n]


def _wavfile():
    try:
        from scipy.io import wavfile
    except ImportError as error:
        raise ImportError('reading and writing sound needs SciPy: pip install "deqjax[media]"') from error
    return wavfile
