"""Reward functions that misbehave, as the text of a module that only verifier processes import."""

# Reward functions. Those that misbehave do so on the response "bad" and give 1 to "good" and 0 to the rest.
FUNCTIONS = """
    import ctypes, json, os, signal, socket, subprocess, sys, time
    import pathlib

    def _each(act):
        def function(questions, responses, answers):
            for response in responses:
                if response == "bad":
                    act()
            return [float(response == "good") for response in responses]
        return function

    def _protocol_fds():
        return [int(argument) for argument in sys.argv[1:3]]

    def _claim_victory(sink):
        # every number that the request may have
        for number in range(200):
            try:
                os.write(sink, json.dumps({"id": number, "values": [1.0]}).encode() + b"\\n")
            except OSError:
                pass

    def _forked_liar():
        if os.fork() == 0:
            _claim_victory(_protocol_fds()[1])
            os._exit(0)
        time.sleep(0.3)
        raise RuntimeError("the parent says so")

    def _forked_returns():
        if os.fork() == 0:
            raise ValueError("this comes from the child")
        time.sleep(0.3)
        raise RuntimeError("the parent says so")

    def _forked_returns_of_libc():
        if ctypes.CDLL(None).fork() == 0:
            raise ValueError("this comes from the child")
        time.sleep(0.3)
        raise RuntimeError("the parent says so")

    def _leave_child(fork, session=False):
        pid = fork()
        if pid == 0:
            if session:
                os.setsid()
            while True:
                time.sleep(10)
        with open(os.environ["CHILDREN"], "a") as file:
            file.write(f"{pid}\\n")

    def _leave_child_and_die(fork, session=False):
        _leave_child(fork, session)
        os._exit(3)

    def _raise():
        raise KeyError("no such thing")

    def _print():
        print(json.dumps({"id": 1, "values": [1.0]}), flush=True)
        os.write(1, b'{"id": 2, "values": [1.0]}\\n')
        os.write(2, b"noise" * 100_000)
        subprocess.run(["echo", '{"id": 3, "values": [1.0]}'])

    def _hog():
        blocks = []
        while True:
            blocks.append(bytearray(64 * 2**20))

    def _flood():
        sink = _protocol_fds()[1]
        while True:
            os.write(sink, b"x" * 65536)

    def _wait_for_death():
        pathlib.Path(os.environ["VICTIM"]).write_text(str(os.getpid()))
        time.sleep(60)

    def _interrupt():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

    loop = _each(lambda: [None for _ in iter(int, 1)])
    big_power = _each(lambda: 9 ** (9 ** 9))  # holds the interpreter's lock: no thread could stop it
    raises = _each(_raise)
    exits = _each(lambda: sys.exit(0))
    dies = _each(lambda: os._exit(0))
    segfaults = _each(lambda: ctypes.string_at(0))
    interrupts = _each(_interrupt)
    prints = _each(_print)
    closes = _each(lambda: os.closerange(0, 256))
    hogs = _each(_hog)
    floods = _each(_flood)
    recurses = _each(lambda: (lambda f: f(f))(lambda f: f(f)))
    waits = _each(_wait_for_death)
    forked_liar = _each(_forked_liar)
    forked_returns = _each(_forked_returns)
    forked_returns_of_libc = _each(_forked_returns_of_libc)
    answers_early = _each(lambda: os.write(_protocol_fds()[1], b'{"id": -1, "values": [1.0]}\\n'))
    says_nonsense = _each(lambda: os.write(_protocol_fds()[1], b'[[[\\n'))
    leaves_child = _each(lambda: _leave_child(os.fork))
    leaves_child_of_libc = _each(lambda: _leave_child_and_die(ctypes.CDLL(None).fork))
    leaves_child_in_session = _each(lambda: _leave_child_and_die(os.fork, session=True))

    def too_few(questions, responses, answers):
        return [1.0]

    def not_finite(questions, responses, answers):
        return [{"bad": float("nan"), "big": 1e300, "good": 1.0}.get(r, 0.0) for r in responses]

    def words(questions, responses, answers):
        return ["one" for _ in responses]

    def nothing(questions, responses, answers):
        return None

    def by_column(questions, responses, answers):
        return [float(q == "q" + r and a == "a" + r) for q, r, a in zip(questions, responses, answers)]

    def environment(questions, responses, answers):
        assert os.environ["JAX_PLATFORMS"] == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == ""
        import math_verify  # which may not bring it either
        return [float(name not in sys.modules) for name in responses]
"""
