"""`taper bench` beside llama.cpp's llama-bench: prompts, and decoding at depths, the same shapes on the same threads.

    python3 benches/llama_cpp.py TAPER LLAMA_BENCH FOLDER none=MODEL-bf16.gguf q8=MODEL-q8_0.gguf q4=MODEL-q4_k_m.gguf

TAPER is the `taper` binary, LLAMA_BENCH that of a llama.cpp build, FOLDER a checkpoint, and each GGUF file that
checkpoint as llama.cpp takes it, beside the format of `taper --quant` that it is compared with; a format may have
several files. Rounds alternate between the two, so that what else the machine does meets both. Medians count, with the
distance of the extremes over them. `taskset` in front chooses the cores, --threads says how many there are."""

import argparse
import json
import statistics
import subprocess
import sys


def run(command):
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return json.loads(done.stdout)


def taper(args, quant, prompt, depth):
    """Tokens a second of each test, and the limit that the memory sets to decoding."""
    command = [args.taper, "bench", args.folder, "--quant", quant, "--prompt", prompt, "--decode", args.decode]
    report = run(command + ["--depth", depth, "--threads", args.threads, "--repetitions", 1, "--json"])
    results = report["results"]
    rates = {result["test"]: result["tokens_per_second"]["median"] for result in results}
    limits = [result["memory_limit_tokens_per_second"] for result in results if result["test"] == "decode"]
    return rates, limits[0]


def llama(args, file, prompt, depth):
    command = [args.llama_bench, "-m", file, "-p", prompt, "-n", args.decode, "-d", depth]
    report = run(command + ["-t", args.threads, "-r", 1, "-o", "json"])
    return {"prompt" if test["n_prompt"] else "decode": test["avg_ts"] for test in report}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("taper")
    parser.add_argument("llama_bench")
    parser.add_argument("folder")
    parser.add_argument("files", nargs="*", metavar="QUANT=FILE")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--depths", type=lambda text: [int(word) for word in text.split(",")], default=[0, 2048])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    files = [file.split("=", 1) for file in args.files]
    quants = list(dict.fromkeys(quant for quant, _ in files)) or ["none", "q8", "q4"]

    samples, limits = {}, {}
    for _ in range(args.rounds):
        for quant in quants:
            for depth in args.depths:
                prompt = args.prompt if depth == args.depths[0] else 0
                rates, limit = taper(args, quant, prompt, depth)
                limits.setdefault((quant, depth), []).append(limit)
                contenders = [(f"taper {quant}", rates)]
                for file in (file for its, file in files if its == quant):
                    contenders.append((f"llama.cpp {file.rsplit('/', 1)[-1]}", llama(args, file, prompt, depth)))
                for name, rates in contenders:
                    for test, rate in rates.items():
                        samples.setdefault((quant, test, depth), {}).setdefault(name, []).append(rate)

    print(f"{'test':<22} {'':<40} {'tok/s':>8} {'spread':>7} {'of limit':>9} {'taper is':>9}")
    for (quant, test, depth), contenders in sorted(samples.items(), key=lambda item: (item[0][1], item[0][2])):
        ours = statistics.median(contenders[f"taper {quant}"])
        for name, rates in contenders.items():
            rate = statistics.median(rates)
            spread = f"{(max(rates) - min(rates)) / rate:.0%}"
            share = f"{rate / statistics.median(limits[quant, depth]):.0%}" if test == "decode" else ""
            times = "" if name.startswith("taper") else f"{ours / rate:.2f} x"
            count = args.prompt if test == "prompt" else args.decode
            row = f"{test} {count} at {depth}"
            print(f"{row:<22} {name:<40} {rate:>8.1f} {spread:>7} {share:>9} {times:>9}")


main()
