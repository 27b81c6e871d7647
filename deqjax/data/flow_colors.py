"""Flow as colours: the hue tells the direction, the saturation the length (Baker et al. 2007)."""

import numpy as np

# Red to yellow, yellow to green, green to cyan, cyan to blue, blue to magenta, magenta to red.
_SEGMENTS = (15, 6, 4, 11, 13, 6)


def color_wheel() -> np.ndarray:
    """55 colours `[55, 3]` around the circle, from 0 to 255."""
    wheel, start = np.zeros((sum(_SEGMENTS), 3)), 0
    # In each segment one channel is full and another one rises or falls.
    for number, n in enumerate(_SEGMENTS):
        ramp = np.floor(255 * np.arange(n) / n)
        full, moving = ((0, 1), (1, 0), (1, 2), (2, 1), (2, 0), (0, 2))[number]
        wheel[start : start + n, full] = 255
        wheel[start : start + n, moving] = ramp if number % 2 == 0 else 255 - ramp
        start += n
    return wheel


def flow_to_image(
    flow: np.ndarray, *, longest: float | None = None, clip: float | None = None, bgr: bool = False
) -> np.ndarray:
    """A picture `[H, W, 3]` of 8 bits of flow `[H, W, 2]`.

    Args:
      flow: in pixels; vectors that are not finite come out black.
      longest: length that is shown fully saturated; None takes the longest vector's.
      clip: limit both components to 0 .. clip first. It is the original's, and drops negative ones.
      bgr: channels in the order of OpenCV.
    """
    flow = np.asarray(flow)
    if flow.ndim != 3 or flow.shape[-1] != 2:
        raise ValueError(f"flow must be [H, W, 2], not {flow.shape}.")
    known = np.isfinite(flow).all(axis=-1)
    flow = np.where(known[..., None], flow, 0)
    flow = flow if clip is None else np.clip(flow, 0, clip)
    longest = np.max(np.sqrt(np.sum(np.square(flow), axis=-1)), initial=0) if longest is None else longest
    image = vectors_to_colors(flow / (longest + 1e-5))
    image[~known] = 0
    return image[..., ::-1] if bgr else image


def vectors_to_colors(vectors: np.ndarray) -> np.ndarray:
    """Colours `[H, W, 3]` of 8 bits of vectors `[H, W, 2]`: white at zero, full at length 1, darker beyond."""
    wheel = color_wheel()
    u, v = vectors[..., 0], vectors[..., 1]
    radius = np.sqrt(np.square(u) + np.square(v))
    position = (np.arctan2(-v, -u) / np.pi + 1) / 2 * (len(wheel) - 1)
    low = np.floor(position).astype(int)
    part = (position - low)[..., None]
    color = (1 - part) * (wheel[low] / 255) + part * (wheel[(low + 1) % len(wheel)] / 255)
    color = np.where(radius[..., None] <= 1, 1 - radius[..., None] * (1 - color), 0.75 * color)
    return np.floor(255 * color).astype(np.uint8)
