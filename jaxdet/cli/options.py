"""What several commands take."""

from typing import Annotated

import typer

from jaxdet.checkpoints.demo import NAME as DEMO_MODEL

Model = Annotated[
    str, typer.Option("--model", "-m", help=f"{DEMO_MODEL}, a folder, a .gguf file or a hub id.")
]
ModelArgument = Annotated[str, typer.Argument(help=f"{DEMO_MODEL}, a folder, a .gguf file or a hub id.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
Backend = Annotated[str | None, typer.Option(help="Kernels; the device's own by default.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens of each answer.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Keep the most likely tokens that make up this probability.")]
TopK = Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this times the most likely one.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same answer.")]
MaxModelLen = Annotated[
    int | None,
    typer.Option(help="Tokens of prompt and answer together; the model's limit, at most 4096, by default."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
