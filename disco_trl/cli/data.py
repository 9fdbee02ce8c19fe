"""`disco-trl data`: tools for preference datasets, before anything is trained on them."""

import argparse
import importlib


TOOLS = {
    "check": ("data_check", "what a preference dataset holds, and what is wrong with it"),
    "convert": ("data_convert", "preferences of another format to the columns that disco-trl reads"),
}


def main(argv: list[str]) -> None:
    """Run `disco-trl data`."""
    parser = argparse.ArgumentParser(
        prog="disco-trl data", description="Check and convert preference datasets.", allow_abbrev=False
    )
    tools = parser.add_subparsers(dest="tool", metavar="TOOL", required=True)
    for name, (_, help_text) in TOOLS.items():
        tools.add_parser(name, help=help_text, add_help=False)
    # What follows the tool is its own, words that look like ours included.
    args, rest = parser.parse_known_args(argv)
    importlib.import_module(f".{TOOLS[args.tool][0]}", __package__).main(rest)
