"""What an operating system leaves in folders that it has looked at, which is nobody's file.

Whoever judges what a folder holds looks at it through `entries` or `files_below`, so that a disk
that was opened in the Finder or the Explorer, or formatted as exFAT or ext4, holds nothing strange.
"""

import re
from pathlib import Path

_LITTER = re.compile(
    r"\._.*"  # what a file system without attributes (exFAT, SMB) holds of a file's attributes
    r"|\.DS_Store|\.localized|Icon\r|\.VolumeIcon\.icns|\.apdisk|\.metadata_never_index"
    r"|\.Spotlight-V100|\.fseventsd|\.Trashes|\.TemporaryItems|\.DocumentRevisions-V100"
    r"|\.AppleDouble|\.AppleDB|\.AppleDesktop|\.PKInstallSandboxManager.*"
    r"|Thumbs\.db(:encryptable)?|ehthumbs(_vista)?\.db|desktop\.ini"
    r"|\$RECYCLE\.BIN|System Volume Information"
    r"|lost\+found|\.Trash(-\d+)?|\.directory|\.nfs[0-9a-f]{8,}|\.fuse_hidden.*"
    r"|@eaDir|#recycle|#snapshot",
    re.IGNORECASE,
)


def is_litter(name: str) -> bool:
    """Whether an operating system, not a person, makes files of this name."""
    return _LITTER.fullmatch(name) is not None


def entries(folder: Path, pattern: str = "*") -> list[Path]:
    """Return what a folder holds, sorted, without litter; nothing where there is no folder.

    Args:
        folder: to look into.
        pattern: of the names that are wanted, as `Path.glob` takes it, without `**`.
    """
    return sorted(path for path in folder.glob(pattern) if not is_litter(path.name))


def files_below(folder: Path, pattern: str = "*") -> list[Path]:
    """Return the files in a folder and in the folders inside it, sorted, without litter."""
    return sorted(
        path
        for path in folder.rglob(pattern)
        if path.is_file() and not any(map(is_litter, path.relative_to(folder).parts))
    )
