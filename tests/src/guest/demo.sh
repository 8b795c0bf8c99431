# A tree of seven instances. Each has a path: the root none, its first child 1, that one's second
# child 12. What it finds in /uk/libukp it says in lines for the host, and it exits with its path.
uk=/uk/libukp
none=00000000-0000-0000-0000-000000000000
path=

say() { echo "@demo $*"; }

say up
while :; do
    case $path in
    '' | 1) forks=2 ;;
    2 | 21) forks=1 ;;
    *) forks=0 ;;
    esac
    children=
    number=0
    while [ $number -lt $forks ]; do
        number=$((number + 1))
        echo 1 >$uk/fork || exit 200
        read=$(cat $uk/fork)
        if [ "$read" = $none ]; then
            path=$path$number
            say born $path "$read" $(ls $uk/vm)
            continue 2
        fi
        say forked $path$number "$read"
        children="$children $read"
    done
    break
done

say vm $(ls $uk/vm)
for child in $children; do
    say status $child $(cat $uk/vm/$child/status)
    echo 1 >$uk/vm/$child/wait || exit 201
    say ended $child $(cat $uk/vm/$child/wait)
done
exit ${path:-0}
