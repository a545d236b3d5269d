"""Pictures side by side in one PNG: a named column for each model, a row for each prompt."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont

from ..linearize.folders import write_atomically

GAP = 6  # pixels
FONT_SIZE = 14  # pixels
GAIN = 3  # brightness factor of differences, which are dark


def difference(image: Image.Image, reference: Image.Image) -> Image.Image:
    """|image - reference|, `GAIN` times as bright."""
    return ImageChops.difference(image, reference).point(lambda value: min(255, GAIN * value))


def write_sheet(columns: Sequence[str], rows: Sequence[Sequence[Image.Image]], path: Path) -> None:
    """Write the rows as a PNG; each column is as wide as its widest picture or name."""
    font = ImageFont.load_default(FONT_SIZE)
    widths = [
        max(int(font.getlength(name)), *(row[column].width for row in rows)) for column, name in enumerate(columns)
    ]
    heights = [max(picture.height for picture in row) for row in rows]
    header = FONT_SIZE + GAP
    sheet = Image.new(
        "RGB", (sum(widths) + GAP * (len(widths) + 1), header + sum(heights) + GAP * (len(rows) + 1)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    left = GAP
    for column, (name, width) in enumerate(zip(columns, widths, strict=True)):
        draw.text((left, GAP // 2), name, fill="black", font=font)
        top = header + GAP
        for row, height in zip(rows, heights, strict=True):
            sheet.paste(row[column], (left, top))
            top += height + GAP
        left += width + GAP
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))
