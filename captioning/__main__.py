"""The commands beside `run_captioning.py`, each a module of `captioning/commands/`; `--help` lists them."""

import importlib
import pkgutil

from captioning import commands
from captioning.command_line import OneLineParser, exit_on_user_error, set_up_logging


def main(argv: list[str] | None = None) -> None:
    """Run a command; what does its work is imported by name, after the arguments were found right.

    Raises:
        UserError: a mistake in its arguments or files.
    """
    parser = OneLineParser(
        prog="python -m captioning",
        description="Caption images, prepare data, score captions, check submissions.",
        epilog="example: python -m captioning score outputs/my-run/predictions/test.jsonl",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(metavar="command")
    for name in (module.name for module in pkgutil.iter_modules(commands.__path__)):
        command = importlib.import_module(f"captioning.commands.{name}")
        texts = {"help": command.__doc__, "description": command.__doc__}
        example = f"example: {parser.prog} {name} {command.EXAMPLE}"
        own = subparsers.add_parser(name, **texts, epilog=example, allow_abbrev=False)
        own.set_defaults(work=command.WORK)
        for flag, options in command.ARGUMENTS.items():
            own.add_argument(flag, **options)
    arguments = parser.parse_args(argv)
    if "work" not in arguments:
        parser.print_help()
        return
    set_up_logging()
    module, function = arguments.work.split(":")
    getattr(importlib.import_module(module), function)(arguments)


if __name__ == "__main__":
    exit_on_user_error(main)
