"""Watch the translator at work: what one command costs inside a running guest."""

from bunshin import Machine
from bunshin.stats import table

PROMPT = "tiny:.*# "

with Machine(image="tiny") as machine:
    machine.start()
    machine.console.expect(PROMPT)
    before = machine.stats()
    machine.console.write("ls -lR /proc/sys | sha256sum\n")
    machine.console.expect(PROMPT)
    after = machine.stats()
    print(table({name: value - before.get(name, 0) for name, value in after.items()}))
