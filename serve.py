"""Serve the model: talk with it in a browser, from OpenAI's client, or over a WebSocket.

    python serve.py                                   http://127.0.0.1:8000 and its page
    python serve.py --responder openai:http://127.0.0.1:11434 --responder_model qwen3
    SERVE_API_KEY=secret python serve.py --host 0.0.0.0

Listens on loopback alone unless it is told otherwise, and beyond it only with a key. Ctrl-C or SIGTERM lets the turns that
are being spoken end first. What is documented at /openapi.json is what it takes.
"""
from __future__ import annotations

import argparse
import os
import sys
import threading
import time

import config
from runtime import plain_errors
from serve_limits import ServeConfig


def build_parser() -> config.Parser:
    parser = config.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="", help="weights (default: checkpoints/best_model.pt, else the shipped ones)")
    parser.add_argument("--adapter", default="", help="a voice: folder written by train.py --lora")
    parser.add_argument("--codec", default="pretrained/codec", help="default pretrained/codec")
    parser.add_argument("--device", default="auto", help="auto|cpu|cuda|mps")
    parser.add_argument("--num_codebooks", type=int, default=0, help="decode only the first N codebooks (default all of the model's)")
    parser.add_argument("--voice", action="append", default=[], metavar="FILE", help="recording of a voice, offered as voice1, voice2, ...; repeat for more")
    parser.add_argument("--responder", default="retrieval", metavar="WHO", help="who answers: retrieval (written dialogues, default), smollm (a small language model), model, command, hf:FOLDER or openai:URL")
    parser.add_argument("--responder_command", default="", help="reads the dialogue on stdin, prints the answer (--responder command)")
    parser.add_argument("--responder_model", default="", help="name of the model at the other server (--responder openai:URL)")
    parser.add_argument("--transcriber", default="whisper", choices=("whisper", "model"), help="who writes down what is heard: whisper (default) or the model's own ear, which needs no other network")
    parser.add_argument("--precision", default="", choices=("", *config.PRECISIONS), help="what products are computed in (default: what the weights' config.json says, else fp32)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads of the model; default: all cores but one, 4 at most")
    config.add_flags(parser, config.SamplingConfig)
    config.add_flags(parser, ServeConfig)
    config.add_flags(parser, config.EndpointConfig)
    config.add_flags(parser, config.LiveConfig)
    config.add_flags(parser, config.BatchingConfig, only=("prefill_positions",))
    return parser


def load(args):
    """A Service as the flags say. From here on this process gives freed memory back."""
    import responders
    import runtime
    import torch
    runtime.return_freed_memory()
    from demo import Lab
    from service import Service, own_ear
    torch.set_num_threads(args.threads or min(4, max(1, runtime.cpu_count() - 1)))
    responder = responders.make(args.responder, args.responder_command, args.responder_model)
    args.compile_depth, args.speculative = False, "off"                                   # ways of one turn at a time; here many are made together
    args.responder = "command" if args.responder == "command" else "retrieval"            # demo.Lab knows no others, and none of its own are asked
    cfg, live, endpoint = (config.from_flags(kind, args) for kind in (ServeConfig, config.LiveConfig, config.EndpointConfig))
    lab = Lab(args)
    return Service(lab, responder, cfg, live, endpoint, own_ear(lab) if args.transcriber == "model" else None, args.prefill_positions)


def the_key(cfg: ServeConfig) -> str:
    """ValueError where the server would listen beyond this machine without one."""
    key = os.environ.get(cfg.key_env, "") if cfg.key_env else ""
    if not key and not cfg.loopback and not cfg.open_to_all:
        raise ValueError(f"--host {cfg.host} lets others in: set {cfg.key_env or 'an environment variable named by --key_env'} to a key, or say --open_to_all")
    return key


def make_server(app, cfg: ServeConfig):
    """uvicorn, which on SIGINT or SIGTERM first closes the doors, lets turns end for up to grace_seconds, and then leaves."""
    import uvicorn
    house = app.state.house

    class Server(uvicorn.Server):
        closing_since = None

        def handle_exit(self, sig, frame):
            if self.closing_since is not None:                   # the second time: at once
                return super().handle_exit(sig, frame)
            self.closing_since = time.monotonic()
            house.close_doors()

        async def on_tick(self, counter: int) -> bool:
            if self.closing_since is not None and (not house.busy or time.monotonic() - self.closing_since > cfg.grace_seconds):
                self.should_exit = True
            return await super().on_tick(counter)
    size, connections = int(1.4e6 * cfg.max_body_mb), 64 + 4 * (cfg.max_sessions + cfg.queue)
    return Server(uvicorn.Config(app, host=cfg.host, port=cfg.port, log_level="warning", access_log=False, server_header=False, ws="websockets-sansio", ws_max_size=size,
                                 ws_ping_interval=20, ws_ping_timeout=20, timeout_keep_alive=15, h11_max_incomplete_event_size=32_768, timeout_graceful_shutdown=5, limit_concurrency=connections, lifespan="on"))


def announce(server, app, cfg: ServeConfig, key: str) -> None:
    """One line once the port is open, with the port that was found where 0 was asked for."""
    while not server.started:
        if server.should_exit:
            return
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    service = app.state.house.service
    print(f"serving {service.lab.model_name} on {service.lab.device} at http://{cfg.host}:{port} ({'with' if key else 'without'} a key; answers: {service.responder.kind}; "
          f"voices: {', '.join(service.voices) or 'none'})", flush=True)


@plain_errors
def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    cfg = config.from_flags(ServeConfig, args)
    key = the_key(cfg)
    if sys.stderr.isatty():
        print("loading model, codec and transcriber", file=sys.stderr, flush=True)
    service = load(args)
    service.warm()
    from serve_app import make_app
    app = make_app(service, key)
    server = make_server(app, cfg)
    threading.Thread(target=announce, args=(server, app, cfg, key), daemon=True).start()
    try:
        server.run()
    except SystemExit:
        raise ValueError(f"cannot listen on {cfg.host}:{cfg.port}: choose another --port or --host") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
