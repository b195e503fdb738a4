"""Boot Linux, run one command in it and print what it says."""

from bunshin import Machine

with Machine(image="tiny") as machine:
    machine.start()
    machine.console.expect("tiny:.*# ")
    machine.console.write("uname -a\n")
    print(machine.console.expect("Linux .*\n")[0].strip())
    machine.console.write("exit\n")
    print(machine.wait(60).kind)
