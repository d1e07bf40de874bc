"""What `alure bench` and `alure tune` say where they are called wrongly or cannot run here: exit code 2."""

import argparse
import json
import sys
from typing import NoReturn

EXIT_USAGE = 2


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        sys.exit(refuse(self.prog, message))


def refuse(command: str, message: str) -> int:
    """The exit code. Under --json stdout ends with an object that says the same."""
    print(f"{command}: {message}", file=sys.stderr)
    if "--json" in sys.argv[1:]:
        print(json.dumps({"error": message, "exit_code": EXIT_USAGE}))
    return EXIT_USAGE
