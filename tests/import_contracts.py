"""A contract of import-linter: modules of an outside package that only some of ours may import, lazily or not.

import-linter's own contracts know outside packages as a whole only.
"""

import re

from importlinter import Contract, ContractCheck, fields, output


class Wall(Contract):
    """Fails where a module that is not allowed to imports one of the outside modules.

    Options:
        package: the outside package.
        names: modules of it, with all below them.
        allowed: our modules that may import them, with all below them.
    """

    package = fields.StringField()
    names = fields.ListField(subfield=fields.StringField())
    allowed = fields.ListField(subfield=fields.StringField())

    def check(self, graph, verbose):
        found = []
        for importer in sorted(graph.find_modules_that_directly_import(self.package)):
            if any(importer == name or importer.startswith(f"{name}.") for name in self.allowed):
                continue
            for detail in graph.get_import_details(importer=importer, imported=self.package):
                if self._reaches(detail["line_contents"]):
                    found.append(f"{importer}:{detail['line_number']}: {detail['line_contents']}")
        return ContractCheck(kept=not found, metadata={"found": found})

    def render_broken_contract(self, check):
        for line in check.metadata["found"]:
            output.print_error(line)

    def _reaches(self, line):
        """Whether a line imports one of the names: `import a.b`, `from a.b import c` or `from a import b`."""
        match = re.match(r"(?:from\s+([\w.]+)\s+)?import\s+(.*)", line.strip())
        if match is None:
            return False
        parts = [part.split(" as ")[0].strip(" ()") for part in match[2].split(",")]
        modules = [f"{match[1]}.{part}" if match[1] else part for part in parts]
        return any(f"{module}.".startswith(f"{name}.") for module in modules for name in self.names)
