from close_engine import Stage


def test_walk(conversation_in):
    assert conversation_in(Stage.COMPLETED).completed_at is not None
