import pickle

from mqc.errors import MqcError, TargetError


def test_text_and_hint() -> None:
    assert str(TargetError("no kernel")) == "no kernel"
    error = TargetError("no kernel", hint="install it")
    assert isinstance(error, MqcError) and error.hint == "install it"
    assert str(error) == "no kernel\n  hint: install it"


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(TargetError("no kernel", hint="install it")))
    assert type(error) is TargetError and str(error) == "no kernel\n  hint: install it"
