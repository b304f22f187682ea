"""Write samples into the folders that GenEval's evaluator reads.

  python tools/sample.py runs/text --prompts geneval/prompts/generation_prompts.txt \\
      --num-samples 2212 --out samples/geneval
  python tools/export_geneval.py samples/geneval geneval/prompts/evaluation_metadata.jsonl \\
      --out geneval_images

Both files come with GenEval and hold the same 553 prompts. With four images of each, --out gets
00000/metadata.jsonl, 00000/samples/0000.png to 0003.png, and so on. Then, in GenEval:

  python evaluation/evaluate_images.py geneval_images --outfile results.jsonl --model-path DETECTOR
"""

import argparse

from diffmoe.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", metavar="SAMPLES", help="a folder that tools/sample.py filled")
    parser.add_argument("metadata", metavar="METADATA", help="GenEval's evaluation_metadata.jsonl")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    options = parser.parse_args()
    from diffmoe.evaluation.geneval import export_geneval
    from diffmoe.evaluation.image_sets import open_images

    each = export_geneval(open_images(options.samples), options.metadata, options.out)
    print(f"{options.out}: {each} images of each prompt")


if __name__ == "__main__":
    run_command(main)
