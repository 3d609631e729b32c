"""Converts tools and tool calls to the one form that the encoders read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.formats.cells import (
    Remarks,
    as_text,
    cell_of,
    check_json,
    is_empty,
    is_missing,
    parse_json,
    parse_object,
    parsed_json,
)
from utils.formats.conversation import BadRow

ARGUMENTS_NOT_OBJECT = 'the arguments of a tool call are not a JSON object: used unchanged'
PARAMETERS_NOT_OBJECT = 'the parameters of a tool are text that is not a JSON object: used unchanged'


def _tool(tool: dict[str, Any], remarks: Remarks) -> dict[str, Any]:
    """Return a tool as {'type': 'function', 'function': {...}}.

    Parameters that are the JSON text of an object are parsed. Other parameters are returned unchanged.
    """
    wrapped = tool if 'function' in tool else {'type': 'function', 'function': tool}
    function = wrapped['function']
    if not isinstance(function, dict) or not isinstance(function.get('parameters'), str):
        return wrapped

    parameters = parse_object(function['parameters'], remarks)
    if isinstance(parameters, str):
        remarks.notes[PARAMETERS_NOT_OBJECT] = None
    return {**wrapped, 'function': {**function, 'parameters': parameters}}


def tools_of(row: Mapping[str, Any], remarks: Remarks) -> list[Any] | None:
    """Return the tools of a row from the column `tools`, or, if it is empty, from `functions` (the older name).

    Returns None if the row has no tools. Raises BadRow if the tools are not a list of objects.
    """
    given = {column: parse_json(cell_of(row, column), column, remarks) for column in ('tools', 'functions')}
    column = 'tools' if given['tools'] else 'functions'
    tools = given[column]
    if not tools:
        return None

    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f'{column} is not a list of objects', column)
    check_json(tools, column)
    if column == 'tools' and given['functions']:
        remarks.note_unused({'functions': given['functions']}, (), 'column')
    return [_tool(tool, remarks) for tool in tools]


def _call(call: Any, remarks: Remarks) -> dict[str, Any]:
    """Return a call as {'type': 'function', 'function': {...}}. Arguments that are JSON text of an object are parsed.

    Raises BadRow if the call has no name or a type other than function.
    """
    wrapper = call if isinstance(call, dict) and 'function' in call else {'function': call}
    kind = wrapper.get('type') or 'function'
    function = wrapper['function']
    if kind != 'function':
        raise BadRow(f"a tool call of type '{kind}'; the only known type is function")
    if not isinstance(function, dict) or not isinstance(function.get('name'), str) or not function['name']:
        raise BadRow('a function call has no name')

    own_id = {'id', 'type'} if function is call else set()
    remarks.note_unused(wrapper, ('type', 'id', 'function'), 'tool call key')
    remarks.note_unused(function, {'name', 'arguments', *own_id}, 'tool call key')

    arguments = function.get('arguments')
    if is_missing(arguments) or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    arguments = parse_object(arguments, remarks)
    if not isinstance(arguments, dict):
        remarks.notes[ARGUMENTS_NOT_OBJECT] = None

    made: dict[str, Any] = {'type': 'function'}
    call_id = call.get('id')
    if not is_empty(call_id):
        made['id'] = as_text(call_id, 'the id of a tool call')
    made['function'] = _in_order_of(function, {'name': function['name'], 'arguments': arguments})
    return _in_order_of(wrapper, made)


def _in_order_of(written: Mapping[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """Return `made` with its keys in the order of `written`, because some templates print the whole object.

    If `written` has no `type`, `type` comes first. All other keys that are not in `written` come last.
    """
    positions = {key: position for position, key in enumerate(written)}
    positions.setdefault('type', -1)
    return dict(sorted(made.items(), key=lambda item: positions.get(item[0], len(written))))


def converted_calls(calls: Any, column: str, remarks: Remarks) -> list[dict[str, Any]]:
    """Return a list of converted calls. `calls` is a list of calls, or one call.

    Raises BadRow for any other value, and for a call that cannot be converted.
    """
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not calls or not all(isinstance(call, dict) for call in calls):
        raise BadRow('tool_calls is not a list of objects', column)
    made = [_call(call, remarks) for call in calls]
    check_json(made, 'tool_calls')
    return made


def calls_in_text(content: str, column: str, remarks: Remarks) -> list[dict[str, Any]]:
    """Return the tool calls of a turn with the role 'call'. `content` is one call or a list of calls as JSON text.

    Raises BadRow if `content` is anything else.
    """
    try:
        parsed = parsed_json(content, remarks)
    except (ValueError, RecursionError):
        raise BadRow('a function call is not JSON') from None

    calls = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(call, dict) for call in calls):
        raise BadRow('a function call has no name')
    return converted_calls(calls, column, remarks)
