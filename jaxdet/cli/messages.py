"""What commands say beside their results."""

import typer


def complain(error: Exception | str) -> None:
    """Says what went wrong, in one line."""
    typer.secho(f"jaxdet: {' '.join(str(error).split())}", fg="red", err=True)
