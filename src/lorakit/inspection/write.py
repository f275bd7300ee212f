"""`lorakit.write_report`: what `inspect_adapter` found, as a file to look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.checkpoint.converting.output import bytes_file, write_file
from lorakit.errors import ConfigError
from lorakit.inspection.page import make_page
from lorakit.inspection.picture import make_picture

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from lorakit.checkpoint.adapter_report import AdapterReport

_FORMS: Mapping[str, Callable[[AdapterReport], bytes]] = {
    ".html": lambda report: make_page(report).encode(),
    ".png": make_picture,
}


def write_report(report: AdapterReport, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a report as a page (".html") or an image (".png").

    The page has the norms as a heat map, the spectra, and tables to sort; it refers to nothing outside of itself. The image
    needs matplotlib.

    Args:
        report: what `inspect_adapter` gave.
        path: of the file.
        overwrite: replace a file that is there.

    Returns:
        The path.

    Raises:
        ConfigError: the name ends otherwise, or the file is there already.
        UnsupportedError: an image without matplotlib.
        OSError: the disk refused. What was there is still there after any of these.
    """
    target = Path(path)
    make = _FORMS.get(target.suffix.lower())
    if make is None:
        raise ConfigError(f"{target}: wanted a name that ends in {' or '.join(_FORMS)}")
    write_file(target, bytes_file(make(report)), overwrite=overwrite)
    return target
