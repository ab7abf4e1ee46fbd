#!/bin/sh
# From two trainings to a champion in traffic, and back. Run it where examples/ lies; MLflow is MLFLOW_TRACKING_URI, or mlflow.db here.
#   mlenv data convert kuairand --source DIR --out work/kuairand
#   sh examples/lifecycle/story.sh
set -eu
here=$(dirname "$0")
data=${DATA:-work/kuairand}
work=${WORK:-work/lifecycle}
name=${NAME:-videos}
port=${PORT:-8080}
seconds=${SECONDS_OF_LOAD:-60}
mkdir -p "$work"

say() { printf '\n== %s\n' "$*"; }
train() { mlenv train "$here/$1.yaml" "data.path=$data" "output=$work/$1" && mlenv register "$work/$1" --name "$name"; }
must_end_with() { # a code, and the command that has to end with it
  expected=$1; shift
  code=0; "$@" || code=$?
  [ "$code" -eq "$expected" ] || { echo "'$*' ended with $code, not with $expected" >&2; exit 1; }
}

say "the first model: the gates judge it by itself"
train champion
mlenv promote "$name" --reason "the first one"

say "a careless one is held: exit code 3, and the champion stays"
train careless
must_end_with 3 mlenv promote "$name" --out "$work/held"

say "a better one replaces the champion"
train challenger
mlenv promote "$name" --out "$work/promoted" --reason "reads the history by what is shown"

say "it is exported, compared with the trainer on every row, and served"
rm -rf "$work/package"
mlenv export "models:/$name@champion" --out "$work/package"
mlenv serve "$work/package" --port "$port" --log "$work/served" &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
until python -c "import sys, urllib.request as web; web.urlopen(sys.argv[1])" "http://127.0.0.1:$port/health" 2>/dev/null; do
  kill -0 "$server" # ends the story when the server has ended
  sleep 0.2
done

say "eight clients ask for $seconds s"
python "$here/load.py" "http://127.0.0.1:$port" "$data/date=2022-05-07" --clients 8 --seconds "$seconds"
kill "$server"
wait "$server" || true

say "what was served is what the champion says"
mlenv replay "models:/$name@champion" --logged "$work/served"

say "the champion is looked after, on rows of the day after"
mlenv monitor "models:/$name@champion" --path "$data" --start 2022-05-08 --now 2022-05-09 --reference "$work/reference.json" \
  --out "$work/monitor" --experiment "$name in use"

say "something is wrong with the traffic: back to the model before"
mlenv rollback "$name" --reason "clicks fell after the change"
mlenv models "$name"
