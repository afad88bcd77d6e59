"""Write the reference pages that the code knows best; with --check find pages that are stale.

docs/configuration.md   from maskwire_server.config
docs/commands.md        from the two commands' own options
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from maskwire.cli import app as client_app
from maskwire.cli import exit_codes, options
from maskwire_server.app import EXIT_CODES
from maskwire_server.cli import app as server_app
from maskwire_server.config import CAN_BE_OFF, OFF, PRESETS, Config, can_be_off
from maskwire_server.config.template import toml

DOCS = Path(__file__).resolve().parent
SHARED = {*options.SHARED, "as_json"}
_MADE = "<!-- Made by docs/generate.py (`make docs`); edit the code instead. -->\n"


def configuration() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration\n",
        _MADE,
        "`maskwire-server init` writes this as a commented TOML file. Flags (`--set section.key=value`) win over the "
        "environment (`MASKWIRE_SECTION__KEY`), which wins over the file. What cannot be used is refused with the "
        "key, the value and what would be right; `maskwire-server check` says so without starting.\n",
        "`[model]`, `[objective]` and `run.seed` belong to the run and cannot change: those that are not set come from the run's record, also where defaults or presets changed since. The rest may change between "
        "restarts: a learning rate, a schedule or `total_steps` at any time, also after a kill (steps that are "
        "computed again use the settings they were trained with); `device`, `precision`, `threads` and "
        "`micro_batch_tokens` after a clean stop.\n",
    ]
    lines.append(
        f'`"{OFF}"` turns off the limits and intervals that can be: {", ".join(f"`{key}`" for key in can_be_off())}. It '
        f'is the same in the file (`every_seconds = "{OFF}"`), the environment (`{OFF}`) and flags '
        f"(`--set checkpoints.every_seconds={OFF}`). Ids, probabilities and counts cannot be off: an id or a "
        "probability of 0 means 0, and an optional setting that is left out is absent (`pad_id`) or chosen "
        "automatically (`threads`, `micro_batch_tokens`).\n"
    )
    definitions = Config.model_json_schema()["$defs"]
    for name, field in Config.model_fields.items():
        section: Any = field.default
        kind = type(section)
        about = (kind.__doc__ or "").strip().partition(": ")[2]
        lines += [
            f"## `[{name}]`\n",
            f"{about[:1].upper()}{about[1:]}\n",
            "| key | default | values | |",
            "|---|---|---|---|",
        ]
        properties = definitions[kind.__name__]["properties"]
        for key, setting in kind.model_fields.items():
            value = getattr(section, key)
            values = _values(properties[key])
            if CAN_BE_OFF in setting.metadata:
                value = OFF if value is None else value
                values += f', or `"{OFF}"`'
            default = "" if value is None else f"`{toml(value)}`"
            words = " ".join((setting.description or "").split()).replace("|", "\\|")
            lines.append(f"| `{key}` | {default} | {values} | {words} |")
        lines.append("")
    lines += ["## Presets\n", "| `objective.preset` | sets |", "|---|---|"]
    lines += [
        f"| `{name}` | {', '.join(f'`{key} = {toml(value)}`' for key, value in keys.items())} |"
        for name, keys in PRESETS.items()
    ]
    return "\n".join(lines) + "\n"


def _values(schema: dict[str, Any]) -> str:
    """What a key may be, in words."""
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    return " or ".join(_one(option) for option in options)


def _one(schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = {
        "integer": "integer",
        "number": "number",
        "boolean": "`true`, `false`",
        "array": "two numbers",
    }.get(schema.get("type", ""), "path" if schema.get("format") == "path" else "text")
    bounds = [
        f"{words} {schema[key]:,}" if isinstance(schema[key], int) else f"{words} {schema[key]:g}"
        for key, words in (
            ("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most"), ("exclusiveMaximum", "below")
        )
        if key in schema
    ]  # fmt: skip
    return ", ".join([kind, *bounds])


def commands() -> str:
    """docs/commands.md."""
    lines = [
        "# Commands\n",
        _MADE,
        "With `--json` a client command prints its answer as JSON on stdout, and an error as "
        '`{"error", "reason", "exit_code"}` on stderr.\n',
    ]
    for name, app, codes in (
        ("maskwire", client_app, exit_codes.CODES),
        ("maskwire-server", server_app, EXIT_CODES),
    ):
        lines += [f"## `{name}`\n", "| exit code | meaning |", "|---|---|"]
        lines += [f"| {code} | {meaning} |" for code, meaning in codes.items()]
        lines.append("")
        command: Any = typer.main.get_command(app)
        if app is client_app:
            lines += ["Every command that reaches a server takes:\n", "| | |", "|---|---|"]
            shared = command.commands["status"].params
            lines += [*(_row(option) for option in shared if option.name in SHARED), ""]
        lines += _command(name, command)
    return "\n".join(lines).rstrip() + "\n"


def _command(path: str, command: Any) -> list[str]:
    if hasattr(command, "commands"):
        return [
            line for name, inner in command.commands.items() for line in _command(f"{path} {name}", inner)
        ]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join(_argument(argument) for argument in arguments)
    lines = [f"### `{path}{' ' + usage if usage else ''}`\n", f"{' '.join((command.help or '').split())}\n"]
    rows = [f"| `{_argument(p).strip('[]')}` | {p.help or ''} |" for p in arguments]
    for option in command.params:
        if option.param_type_name == "option" and not option.hidden and option.name not in SHARED:
            rows.append(_row(option))
    return [*lines, "| | |", "|---|---|", *rows, ""] if rows else lines


def _argument(argument: Any) -> str:
    name = argument.name.upper() + (" ..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _row(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    if not option.is_flag:
        kind = getattr(option.type_descriptor.annotation, "__name__", "text")
        names += f" {option.metavar or {'str': 'TEXT'}.get(kind, kind.upper())}"
    return f"| {names} | {_help(option)} |"


def _help(option: Any) -> str:
    words = (option.help or "").replace("|", "\\|")
    extras = []
    if option.required:
        extras.append("needed")
    if option.envvar:
        extras.append(f"`{option.envvar}` in the environment")
    if not option.is_flag and option.default not in (None, "", ()) and option.name != "retry_for":
        extras.append(f"default `{option.default}`")
    return words + (f" ({'; '.join(extras)})" if extras else "")


PAGES = {"configuration.md": configuration, "commands.md": commands}


def main() -> int:
    """Entry point; exit status 1 when --check finds a stale page."""
    stale = []
    for name, make in PAGES.items():
        path, text = DOCS / name, make()
        if sys.argv[1:] == ["--check"]:
            if not path.exists() or path.read_text() != text:
                stale.append(name)
        else:
            path.write_text(text)
    if stale:
        print(f"stale pages: {', '.join(stale)}; run `make docs` and commit the result", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
