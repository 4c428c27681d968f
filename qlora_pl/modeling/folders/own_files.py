"""Files of a folder that somebody sent: whether a name in it leads out of it.

A manifest, an index or a symbolic link could otherwise have any file of this machine read,
compared, loaded and, with the folder, passed on.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath


def is_plain_name(name: object) -> bool:
    """Whether a name is that of a file in a folder or below it, as text alone can tell."""
    if not isinstance(name, str) or not name:
        return False
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.anchor or ".." in path.parts:
            return False
    return True


def lies_in(folder: Path, name: str) -> bool:
    """Whether a file is the folder's own after every symbolic link was followed.

    The snapshots of the Hub's cache are folders of links into the blobs beside them, which count.
    """
    home, target = folder.resolve(), (folder / name).resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parents[1] / "blobs")
    return is_plain_name(name) and any(target.is_relative_to(own) for own in homes)
