"""Transfer of sgcl's weights to tasks whose parts live in torchvision."""


class Refused(Exception):
    """What cannot be done with what was given: a message that ends `; remedy`, and an exit code of sysexits.h."""

    def __init__(self, message, code=65):
        super().__init__(message)
        self.code = code
