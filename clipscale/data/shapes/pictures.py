"""What the shapes set shows: attributes drawn from a seed, the pictures that show them, the captions that tell them.

    attributes = draw_attributes(seed=0, split="train", first=7, count=2)   # what to draw: class, size, position, ...
    pixels = render(attributes, image_size=32)                              # uint8 [2, 32, 32, 3]
    captions(attributes)            # ["a small red circle near the top edge", "the star is blue"]

Sample `index` of a split is a pure function of (seed, split, index): its random numbers are words of a Philox stream at
a place given by the index, and every step from them to the uint8 pixels uses only +, -, *, / and square roots, which
IEEE 754 rounds in one way. So the set does not depend on batch sizes, on the number of processes or on the machine.

A class is a (colour, shape) pair. Training and validation leave out HELD_OUT, the test split holds every class equally
often: zero-shot accuracy on the held-out ones shows whether colour and shape were learned as words or as pairs.

Shapes of arrays: n pictures, S side in pixels, 64 classes.
"""

from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (222, 32, 38),
    "orange": (252, 130, 18),
    "yellow": (250, 220, 40),
    "green": (38, 168, 66),
    "cyan": (50, 212, 232),
    "blue": (42, 80, 230),
    "purple": (150, 60, 212),
    "pink": (250, 122, 196),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent")
CLASSES = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
CLASS_NAMES = tuple(f"{colour} {shape}" for colour, shape in CLASSES)


def _is_held_out(label: int) -> bool:
    """The eight pairs on a diagonal of the colour x shape table: each colour and each shape loses one."""
    colour, shape = divmod(label, len(SHAPES))
    return (shape - colour) % len(SHAPES) == 3


HELD_OUT = tuple(label for label in range(len(CLASSES)) if _is_held_out(label))
SEEN = tuple(label for label in range(len(CLASSES)) if not _is_held_out(label))

# Half extent of the shape as a fraction of the side: (least, most), and the words for it.
SIZES = (
    ((0.195, 0.215), ("small", "little", "tiny")),
    ((0.245, 0.265), ("medium", "medium-sized", "mid-sized")),
    ((0.285, 0.310), ("large", "big", "huge")),
)
# (column, row) from -1 to 1, and the words.
POSITIONS = (
    ((-1, -1), ("in the top left corner", "at the upper left")),
    ((0, -1), ("at the top", "near the top edge")),
    ((1, -1), ("in the top right corner", "at the upper right")),
    ((-1, 0), ("on the left", "on the left side")),
    ((0, 0), ("in the center", "in the middle")),
    ((1, 0), ("on the right", "on the right side")),
    ((-1, 1), ("in the bottom left corner", "at the lower left")),
    ((0, 1), ("at the bottom", "near the bottom edge")),
    ((1, 1), ("in the bottom right corner", "at the lower right")),
)
# (colour, texture, strength of the texture in grey levels, words). Little chroma, so no shape drowns in its background.
BACKGROUNDS = (
    ((243, 242, 239), "gradient", 4, ("on a white background", "on white paper")),
    ((142, 144, 147), "gradient", 6, ("on a gray background", "on plain gray")),
    ((44, 46, 52), "gradient", 6, ("on a dark background", "in the dark")),
    ((222, 207, 182), "gradient", 5, ("on a beige background", "on sand")),
    ((150, 150, 154), "gradient", 62, ("on a shaded background", "on a gradient")),
    ((198, 199, 196), "stripes", 24, ("on a striped background", "on stripes")),
    ((92, 95, 102), "checks", 24, ("on a checkered background", "on a checkerboard")),
    ((176, 170, 164), "speckles", 36, ("on a speckled background", "on gravel")),
)

# Half of the captions tell colour and shape only, the others a detail or more besides.
PLAIN_CAPTIONS = (
    "{an} {colour} {shape}",
    "a picture of {an} {colour} {shape}",
    "one {colour} {shape}",
    "a {shape} that is {colour}",
    "the {shape} is {colour}",
    "a {shape} colored {colour}",
)
DETAILED_CAPTIONS = (
    "a {size} {colour} {shape}",
    "a {size} {shape} in {colour}",
    "the {colour} {shape} is {size}",
    "{an} {colour} {shape} {where}",
    "{where}, {an} {colour} {shape}",
    "the {colour} {shape} sits {where}",
    "{an} {colour} {shape} {ground}",
    "{ground}, {an} {colour} {shape}",
    "a picture of a {shape} in {colour} {ground}",
    "a {size} {colour} {shape} {where}",
    "a {size} {colour} {shape} {ground}",
    "this drawing shows the {colour} {shape} {where}",
    "{an} {colour} {shape} {where}, {ground}",
    "a {size} {shape}, {colour}, {where}, {ground}",
    "this drawing shows a {size} {colour} {shape} {where}, {ground}",
)
# For the zero-shot classifier; without an article, which "{}" could not make agree ("a orange star").
ZERO_SHOT_TEMPLATES = ("{}", "one {}", "the {}", "a picture of the {}", "this drawing shows the {}")

SPLITS = ("train", "validation", "test")
_ATTRIBUTES, _NOISE, _SHUFFLE = range(3)  # what a Philox stream is for
_WORDS = 24  # 64-bit words per picture in the attribute stream, a multiple of Philox's block of four


@dataclass(frozen=True)
class Attributes:
    """What `n` pictures show. Lengths are fractions of the side, directions have y pointing down."""

    label: np.ndarray  # int [n], index into CLASSES
    size: np.ndarray  # int [n], index into SIZES
    position: np.ndarray  # int [n], index into POSITIONS
    background: np.ndarray  # int [n], index into BACKGROUNDS
    centre: np.ndarray  # float [n, 2], x and y
    radius: np.ndarray  # float [n]
    tilt: np.ndarray  # float [n], tangent of half the rotation
    paint: np.ndarray  # float [n, 3], the shape's RGB
    base: np.ndarray  # float [n, 3], the background's RGB
    slope: np.ndarray  # float [n, 2], direction of shading, gradient and stripes
    phase: np.ndarray  # float [n, 2], offset of the texture
    wording: np.ndarray  # float [n, 4] in [0, 1): caption, and the words for size, position and background
    noise: tuple[int, int, int]  # (seed, split number, index of the first picture), for the pixel noise


# --- random numbers ---------------------------------------------------------------------------------------------------


def _raw_words(seed: int, split: int, purpose: int, first: int, count: int, per_item: int) -> np.ndarray:
    """uint64 [count, per_item]: the words of items first .. first + count of one stream; `per_item` in fours."""
    assert per_item % 4 == 0
    key = np.array([seed, split * 16 + purpose], dtype=np.uint64)
    return np.random.Philox(key=key, counter=first * (per_item // 4)).random_raw(count * per_item).reshape(count, -1)


def _unit(words: np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1) from the upper 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_attributes(seed: int, split: str, first: int, count: int) -> Attributes:
    """Attributes of pictures `first` to `first + count` of a split. Test labels take turns: picture i has i mod 64."""
    number = SPLITS.index(split)
    u = _unit(_raw_words(seed, number, _ATTRIBUTES, first, count, _WORDS))
    jitter = 2 * u - 1  # [-1, 1)

    def choose(column: int, options: int) -> np.ndarray:
        return (u[:, column] * options).astype(np.int64)

    if split == "test":
        label = (first + np.arange(count)) % len(CLASSES)
    else:
        label = np.array(SEEN)[choose(0, len(SEEN))]
    size, position, background = choose(1, len(SIZES)), choose(2, len(POSITIONS)), choose(3, len(BACKGROUNDS))
    least, most = np.array([bounds for bounds, _ in SIZES]).T
    radius = least[size] + u[:, 4] * (most - least)[size]
    # Clear of the edge by 0.05, less the jitter of 0.02 and what corners stick out beyond the radius: never cut.
    offset = np.array([place for place, _ in POSITIONS])[position] * (0.45 - radius)[:, None]
    paint = np.array(list(COLOURS.values()), dtype=np.float64)[label // len(SHAPES)]
    base = np.array([colour for colour, *_ in BACKGROUNDS], dtype=np.float64)[background]
    return Attributes(
        label=label,
        size=size,
        position=position,
        background=background,
        centre=0.5 + offset + 0.02 * jitter[:, 5:7],
        radius=radius,
        tilt=0.1 * jitter[:, 7],  # +-11 degrees: squares stay squares, crosses stay upright
        paint=paint + 12 * jitter[:, 8:11],
        base=base + 6 * jitter[:, 11:12] + 4 * jitter[:, 12:15],
        slope=jitter[:, 15:17],
        phase=u[:, 17:19],
        wording=u[:, 19:23],
        noise=(seed, number, first),
    )


# --- pictures ---------------------------------------------------------------------------------------------------------
# Signed distances in units of the shape's radius, y up, negative inside; the formulas for star, heart and crescent
# follow Inigo Quilez, "2D distance functions" (iquilezles.org/articles/distfunctions2d).


def _length(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y)


def _circle(x, y):
    return _length(x, y) - 0.95


def _box(x, y, half_width, half_height):
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    return _length(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _square(x, y):
    return _box(x, y, 0.8, 0.8) - 0.04


def _triangle(x, y):
    # Tip at (0, 0.9), base from (-0.9, -0.8) to (0.9, -0.8): the farthest of three half-planes.
    side = (np.abs(x) * 17 + y * 9 - 8.1) * (1 / 19.235384061671343)  # sqrt(17^2 + 9^2)
    return np.maximum(side, -0.8 - y)


def _star(x, y, inner=0.42):
    # Fold the plane onto one tenth of the star, then the distance to one edge.
    cos, sin = 0.8090169943749475, 0.5877852522924731  # of 36 degrees
    x = np.abs(x)
    y = y + 0.04
    fold = 2 * np.maximum(x * cos - y * sin, 0)
    x, y = x - fold * cos, y + fold * sin
    fold = 2 * np.maximum(-x * cos - y * sin, 0)
    x, y = np.abs(x + fold * cos), y + fold * sin - 1.08
    edge_x, edge_y = inner * sin, inner * cos - 1
    along = np.clip((x * edge_x + y * edge_y) * (1 / (edge_x * edge_x + edge_y * edge_y)), 0, 1.08)
    distance = _length(x - edge_x * along, y - edge_y * along)
    return np.where(y * edge_x > x * edge_y, distance, -distance)


def _cross(x, y):
    return np.minimum(_box(x, y, 0.98, 0.30), _box(x, y, 0.30, 0.98))


def _ring(x, y):
    return np.abs(_length(x, y) - 0.74) - 0.24


def _heart(x, y):
    scale = 1.64  # the formula's heart stands on (0, 0) and is 1.10 high and 1.2 wide
    x, y = np.abs(x) * (1 / scale), y * (1 / scale) + 0.55
    lobe = _length(x - 0.25, y - 0.75) - 0.35355339059327373
    middle = np.maximum(x + y, 0) * 0.5
    flank = np.minimum(_length(x, y - 1), _length(x - middle, y - middle))
    return np.where(x + y > 1, lobe, np.where(x > y, flank, -flank)) * scale


def _crescent(x, y):
    # A disc less a disc; turned by 3-4-5 so that the horns point up and to the right.
    x = x - 0.05
    x, y = 0.8 * x + 0.6 * y, 0.8 * y - 0.6 * x
    return np.maximum(_length(x, y) - 1.0, 0.86 - _length(x - 0.52, y))


_DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "crescent": _crescent,
}


def _grid(image_size: int) -> np.ndarray:
    """Pixel centres in [0, 1], float32 [S]."""
    return (np.arange(image_size, dtype=np.float32) + np.float32(0.5)) / np.float32(image_size)


def coverage(attributes: Attributes, image_size: int) -> np.ndarray:
    """Share of each pixel that the shape covers, float32 [n, S, S]: the distance to its edge, in pixels, clipped."""
    grid = _grid(image_size)
    shape = attributes.label % len(SHAPES)
    distance = np.empty((len(shape), image_size, image_size), dtype=np.float32)
    square = attributes.tilt**2
    cos, sin = (1 - square) / (1 + square), 2 * attributes.tilt / (1 + square)
    for number, name in enumerate(SHAPES):
        (rows,) = np.nonzero(shape == number)
        if not len(rows):
            continue

        def column(values: np.ndarray, rows=rows) -> np.ndarray:
            return values[rows, None, None].astype(np.float32)

        dx = (grid[None, None, :] - column(attributes.centre[:, 0])) / column(attributes.radius)
        dy = (column(attributes.centre[:, 1]) - grid[None, :, None]) / column(attributes.radius)
        x = column(cos) * dx + column(sin) * dy
        y = column(cos) * dy - column(sin) * dx
        distance[rows] = _DISTANCES[name](x, y)
    distance *= -image_size * attributes.radius[:, None, None].astype(np.float32)
    distance += np.float32(0.5)
    return np.clip(distance, 0, 1, out=distance)


def _texture(attributes: Attributes, ramp: np.ndarray, noise: np.ndarray, image_size: int) -> np.ndarray:
    """Grey levels to add to the background, float32 [n, S, S]. `ramp` runs along `slope`, about -1 to 1."""
    grid = _grid(image_size)
    texture = np.empty_like(ramp)
    for number, (_, kind, strength, _) in enumerate(BACKGROUNDS):
        (rows,) = np.nonzero(attributes.background == number)
        phase = attributes.phase[rows, :, None, None].astype(np.float32)
        if kind == "gradient":
            pattern = ramp[rows]
        elif kind == "stripes":  # a triangle wave, steepened: stripes with soft edges
            wave = ramp[rows] * 3 + phase[:, 0]
            pattern = np.clip(np.abs(wave - np.floor(wave) - np.float32(0.5)) * 12 - 3, -1, 1)
        elif kind == "checks":  # eight by eight fields
            across = np.floor(grid * 8 + phase[:, 0] * 2)
            down = np.floor(grid[:, None] * 8 + phase[:, 1] * 2)
            field = (across + down) * np.float32(0.5)
            pattern = (field - np.floor(field)) * 4 - 1
        else:  # speckles: the tails of the noise
            pattern = np.sign(noise[rows, 1]) * np.maximum(np.abs(noise[rows, 1]) - np.float32(0.72), 0) * 5
        texture[rows] = pattern * np.float32(strength)
    return texture


def render(attributes: Attributes, image_size: int) -> np.ndarray:
    """Pictures, uint8 [n, S, S, 3]: shaded shape over a textured background, anti-aliased, with slight noise."""
    n, side = len(attributes.label), image_size
    seed, split, first = attributes.noise
    words = -(-side * side * 3 // 32) * 4  # one byte per value, in whole blocks of Philox
    noise = _raw_words(seed, split, _NOISE, first, n, words).astype("<u8", copy=False).view(np.uint8)
    noise = noise[:, : side * side * 3].reshape(n, 3, side, side).astype(np.float32) * np.float32(2 / 255) - 1
    slope = attributes.slope[:, :, None, None].astype(np.float32)
    grid = _grid(side) - np.float32(0.5)
    ramp = slope[:, 0] * grid[None, None, :] + slope[:, 1] * grid[None, :, None]

    # Planes [n, 3, S, S]: the channel axis in front keeps the inner loops long.
    picture = attributes.base[:, :, None, None].astype(np.float32) + _texture(attributes, ramp, noise, side)[:, None]
    paint = attributes.paint[:, :, None, None].astype(np.float32) * (1 - np.float32(0.16) * ramp)[:, None]
    picture += coverage(attributes, side)[:, None] * (paint - picture)
    picture += noise * np.float32(5)
    np.clip(picture, 0, 255, out=picture)
    return np.ascontiguousarray(np.rint(picture, out=picture).astype(np.uint8).transpose(0, 2, 3, 1))


# --- captions ---------------------------------------------------------------------------------------------------------


def captions(attributes: Attributes) -> list[str]:
    """One caption per picture: always its colour and shape, sometimes size, position and background."""
    texts = []
    for row, label in enumerate(attributes.label.tolist()):
        colour, shape = CLASSES[label]
        caption, size_word, place_word, ground_word = attributes.wording[row].tolist()
        sizes = SIZES[attributes.size[row]][1]
        places = POSITIONS[attributes.position[row]][1]
        grounds = BACKGROUNDS[attributes.background[row]][3]
        wordings = PLAIN_CAPTIONS if caption < 0.5 else DETAILED_CAPTIONS
        texts.append(
            wordings[int(caption % 0.5 * 2 * len(wordings))].format(
                an=f"{'an' if colour[0] in 'aeiou' else 'a'}",
                colour=colour,
                shape=shape,
                size=sizes[int(size_word * len(sizes))],
                where=places[int(place_word * len(places))],
                ground=grounds[int(ground_word * len(grounds))],
            )
        )
    return texts


def shuffled_captions(seed: int, samples: int) -> list[str]:
    """The training captions in an order that has nothing to do with the pictures."""
    texts = []
    for first in range(0, samples, 4096):
        texts += captions(draw_attributes(seed, "train", first, min(4096, samples - first)))
    order = np.argsort(_raw_words(seed, 0, _SHUFFLE, 0, samples, 4)[:, 0], kind="stable")
    return [texts[index] for index in order.tolist()]
