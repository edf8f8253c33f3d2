"""`python -m fishrt`."""

from .cli import main

main(prog_name="fishrt")
