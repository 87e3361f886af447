"""Options that several commands of the command line have."""

from typing import Annotated

import typer

Source = Annotated[
    str | None, typer.Option(help="Folder, hf://org/name@revision or s3://bucket/prefix.")
]
Window = Annotated[
    int, typer.Option(min=1, help="Fetched source shards that may be on disk at a time.")
]
Reuse = Annotated[
    list[str] | None,
    typer.Option(help="Workspace or output of another build to copy from; may be given again."),
]
Replace = Annotated[
    bool, typer.Option(help="Make it where a build of another recipe or source stands.")
]
RecipeOption = Annotated[str, typer.Option(help="Path of a .yaml file, or a name in recipes/.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show logs and tracebacks.")]
